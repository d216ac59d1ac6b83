#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "core/schedule.h"

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
  GroupReader(PyObject* group, int64_t index) : group_(group), index_(index) {}

  double number(const Key& key) const;  // a Python number or a tensor of one element
  bool flag(const Key& key) const;      // false if the group lacks it
  void betas(double& beta1, double& beta2) const;
  [[noreturn]] void fail(const std::string& what) const;
  void require(bool holds, const char* what, double value) const;

 private:
  pybind11::handle find(const Key& key) const;  // borrowed, null if it is not there
  double to_number(pybind11::handle value, const char* name) const;

  PyObject* group_;
  int64_t index_;
};

struct OptimizerRow {
  const char* name;
  RuleId rule;
  std::array<Key, kMaxStates> state_names;  // the first num_states(hyper) are in use
  bool counts_steps;                        // the state has "step"
  Hyper (*read)(const GroupReader& group);  // checks every value
  int (*num_states)(const Hyper& hyper);
  int (*variant)(const Hyper& hyper);
  // `step` counts from 1; `is_first`: the state is new.
  Scalars (*scalars)(const Hyper& hyper, double step, bool is_first, double grad_scale);
};

// Raises ValueError for an unknown name.
const OptimizerRow& find_optimizer(const std::string& name);

}  // namespace fusedopt
