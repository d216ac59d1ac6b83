#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "core/gpu.h"

// The table of optimizers: for each, the names torch gives to its state and how a param group's
// options become the rule's numbers. One row is what adding an optimizer takes here.
namespace fusedopt {

// A string that is looked up in dicts again and again.
class Key {
 public:
  explicit Key(const char* name) : name_(name) {}
  const char* name() const { return name_; }
  PyObject* object() const {  // borrowed; interned at first use and kept
    if (object_ == nullptr) object_ = PyUnicode_InternFromString(name_);
    return object_;
  }

 private:
  const char* name_;
  mutable PyObject* object_ = nullptr;
};

// Reads options of one param group; raises ValueError or TypeError naming option and group.
class GroupReader {
 public:
  // Numbers on a GPU are left there if `leave_on_gpu`: a valid number then stands in for them.
  GroupReader(PyObject* group, int64_t index, bool leave_on_gpu)
      : group_(group), index_(index), leave_on_gpu_(leave_on_gpu) {}

  // A Python number or a tensor of one element; `on_gpu` tells where it is, if it was left there.
  double number(const Key& key, cuda::DeviceNumber& on_gpu);
  bool flag(const Key& key) const;  // false if the group lacks it
  // A Python number or a tensor of one element; `otherwise` if the group lacks it or it is None.
  double number_or(const Key& key, double otherwise);
  bool has(const Key& key) const;  // and it is not None
  Master master_weights() const;
  void betas(cuda::HyperSource& source);
  bool is_capturable() const;
  bool errs_if_nonfinite() const;
  void check_state_dtype() const;
  int numbers_gpu() const { return numbers_gpu_; }  // the GPU they were left on, or -1
  [[noreturn]] void fail(const std::string& what) const;
  void require(bool holds, const char* what, double value) const;

 private:
  pybind11::handle find(const Key& key) const;  // borrowed, null if it is not there
  double to_number(pybind11::handle value, const char* name, cuda::DeviceNumber* on_gpu);
  bool find_on_gpu(pybind11::handle value, const char* name, cuda::DeviceNumber& on_gpu);

  PyObject* group_;
  int64_t index_;
  bool leave_on_gpu_;
  int numbers_gpu_ = -1;
};

struct OptimizerRow {
  const char* name;
  RuleId rule;
  std::array<Key, kMaxStates> state_names;        // the first num_states(hyper) are in use
  bool always_counts;                             // the state has "step" whatever the options
  cuda::HyperSource (*read)(GroupReader& group);  // checks every value
  int (*num_states)(const Hyper& hyper);
};

// Whether a parameter's state has "step".
bool counts_steps(const OptimizerRow& row, const Hyper& hyper);

// Raises ValueError for an unknown name.
const OptimizerRow& find_optimizer(const std::string& name);

}  // namespace fusedopt
