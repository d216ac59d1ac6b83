// The tensors of one parameter's update, their checks, and the words for what is wrong with them.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/group_options.h"
#include "bindings/memory.h"
#include "bindings/options.h"
#include "bindings/param_table.h"
#include "bindings/torch_api.h"
#include "core/hyper.h"
#include "core/layout.h"
#include "core/weight.h"

namespace fusedopt {

// Where a parameter stands in its optimizer, for messages.
struct ParamId {
  PyObject* group;  // the param group's dict
  int64_t group_index;
  int64_t index;

  std::string text() const;  // "parameter 'fc.weight' (group 0, index 3)"
};

// What names the params and grads among the operands.
inline const Key kParamName("param"), kGradName("grad");

// One parameter in one step: what is found in Python's objects, and then what is read of it.
struct Operands {
  ParamId id;
  References& held;  // where what is found on the way to a tensor's memory is kept
  // Each in its place (core/layout.h), which is in use if it has a name.
  PyObject* tensors[kMaxTensors] = {};  // borrowed from `held`; null for state that is missing
  Shard shards[kMaxTensors];            // of those that have been found
  const Key* names[kMaxTensors] = {&kParamName, &kGradName};
  TensorView views[kMaxTensors];  // of those that have been read
  PyObject* state = nullptr;      // the dict they are from
  PyObject* step = nullptr;       // null if it is missing, and for optimizers that do not count
  PyObject* rows = nullptr;       // int64, which rows the grad is of; null: of all
  int64_t num_rows = 0;
  Master master = Master::kNone;
  StochasticRounding rounding = StochasticRounding::kNone;
  bool draws_codes = false;     // for which steps must be counted
  bool is_complete = false;     // the state has all that is in use
  bool has_known_specs = true;  // a DTensor and its states lie over devices as in the step before
  bool is_grad_alike = true;    // and the grad as its param

  Operands(const ParamId& at, References& references) : id(at), held(references) {}
  bool has(int k) const { return names[k] != nullptr; }
  bool has_codes(int k) const { return k >= kFirstState && k < kMaster && has(scale_of_state(k)); }

  void find_shards() {
    for (int k = 0; k < kMaxTensors; ++k)
      if (tensors[k] != nullptr) shards[k] = find_shard(tensors[k], held);
  }

  // Calls f for the plain tensors that have been found.
  template <class F>
  void for_each_plain(const F& f) const {
    for (const Shard& shard : shards)
      if (shard.tensor != nullptr) f(shard.tensor);
    if (step != nullptr && is_plain(step)) f(step);
  }
};

// "grad of parameter 'fc.weight' (group 0, index 3) is ", to begin a message with; for the param
// itself and for step, `name` is "" and "step".
std::string subject(const ParamId& id, const std::string& name);

// Reads tensor number k into its view. Raises TypeError for what no step can work on, ValueError
// where memory does not hold the tensor's values; a grad is then replaced by a copy that does, if
// its values can be known.
void read_operand(Operands& operands, int k);

// Raises ValueError or TypeError unless operand k fits the param: shape, device, real or complex.
void check_against_param(const Operands& operands, int k);

// Raises TypeError for a master weight of another dtype than its kind has.
void check_master(const Operands& operands);

// Raises TypeError or ValueError unless operand k and its scales are codes of that kind.
void check_codes(const Operands& operands, int k, DType kind);

// Who steps the param, in ParamUpdate::device's terms. Raises if it is on a device that this build
// cannot step.
uint8_t find_device(const Operands& operands);

// Real dims with the strides of every operand; a complex element is a dim of two. For draws also
// those of the elements' numbers: a tensor is rounded the same way in any layout.
Dims make_dims(const Operands& operands, bool has_draws);

}  // namespace fusedopt
