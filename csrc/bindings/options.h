// Reads the options of a param group, which users may set to anything, and checks every value.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "bindings/python.h"
#include "core/gpu.h"
#include "core/stochastic.h"
#include "core/weight.h"

namespace fusedopt {

// A string that is looked up in dicts again and again.
class Key {
 public:
  explicit Key(const char* name) : name_(name), object_(PyUnicode_InternFromString(name)) {}
  const char* name() const { return name_; }
  PyObject* object() const { return object_; }  // borrowed
  // For dicts that will be searched by the key: an equal string of another identity is found
  // slowly.
  pybind11::str str() const { return pybind11::reinterpret_borrow<pybind11::str>(object_); }

 private:
  const char* name_;
  PyObject* object_;  // interned, and kept for good
};

// Which values of options are refused. torch looks at an optimizer's defaults when it is made, and
// at nothing later: schedules may leave the ranges, if only by rounding.
enum class Ranges {
  kAny,
  kOfTorch,
  kSensible,  // what a step can compute with
};

// Reads options of one param group; raises ValueError or TypeError naming option and group.
class GroupReader {
 public:
  // Numbers on a GPU are left there if `leave_on_gpu`: a valid number then stands in for them.
  GroupReader(PyObject* group, int64_t index, bool leave_on_gpu, Ranges ranges = Ranges::kSensible)
      : group_(group), index_(index), leave_on_gpu_(leave_on_gpu), ranges_(ranges) {}

  // A Python number or a tensor of one element; `on_gpu` tells where it is, if it was left there.
  double number(const Key& key, cuda::DeviceScalar& on_gpu) { return number(key, &on_gpu); }
  double number(const Key& key) { return number(key, nullptr); }  // is left nowhere
  bool flag(const Key& key) const;                                // false if the group lacks it
  StochasticRounding stochastic_rounding() const;
  // A Python number or a tensor of one element; `otherwise` if the group lacks it or it is None.
  double number_or(const Key& key, double otherwise);
  bool has(const Key& key) const;  // and it is not None
  Master master_weights() const;
  void betas(cuda::HyperParamsRef& source);
  std::pair<double, double> pair(const Key& key);  // two Python numbers
  pybind11::object params() const;                 // a tuple
  bool is_capturable() const;
  bool errs_if_nonfinite() const;
  pybind11::object state_dtype() const;             // a torch.dtype, or None
  bool wants_codes() const;                         // states of 8 bits, where that can be
  void check_precision() const;                     // the values of these, and of master_weights
  int scalars_gpu() const { return scalars_gpu_; }  // the GPU they were left on, or -1
  [[noreturn]] void fail(const std::string& what) const;
  // Fails for infinite and NaN values.
  void require(bool holds, const char* what, std::initializer_list<double> values) const;
  void require(bool holds, const char* what, double value) const { require(holds, what, {value}); }
  void require_finite(const char* what, double value) const { require(true, what, value); }
  // As require(), but only for values that torch refuses when an optimizer is made.
  void require_at_first(bool holds, const char* what, double value) const {
    require(holds || !is_construction(), what, value);
  }
  bool is_construction() const { return ranges_ == Ranges::kOfTorch; }
  References& held() { return held_; }  // tensors whose memory the numbers on a GPU are in

 private:
  pybind11::object find(const Key& key) const;  // a null object if it is not there
  double number(const Key& key, cuda::DeviceScalar* on_gpu);
  double to_number(pybind11::handle value, const char* name, cuda::DeviceScalar* on_gpu);
  bool find_on_gpu(pybind11::handle value, const char* name, cuda::DeviceScalar& on_gpu);
  pybind11::tuple find_pair(const Key& key);

  PyObject* group_;
  int64_t index_;
  bool leave_on_gpu_;
  Ranges ranges_;
  int scalars_gpu_ = -1;
  References held_;
};

}  // namespace fusedopt
