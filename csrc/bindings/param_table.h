// What a step works on, as plain data. Collector (collect.h) fills it in; the other passes of a
// step (scalars.h, aliases.h, grad_norm.h, gpu_steps.h) read it and add what they find out.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <vector>

#include "bindings/fingerprint.h"
#include "core/gpu.h"
#include "core/overlap.h"
#include "core/step.h"

namespace fusedopt {

// The tensors of an update: the operands, and the scales of states that are codes (core/codes.h).
inline constexpr int kFirstScale = kMaxOperands;
inline constexpr int kMaxTensors = kFirstScale + kMaxStates;
constexpr int scale_of_state(int operand) { return kFirstScale + (operand - kFirstState); }

// A number of writes that no tensor has.
inline constexpr int64_t kNotCounted = -2;

// What is known of a parameter beside its ParamUpdate.
struct ParamCache {
  enum class StepType : uint8_t { kFloat32, kFloat64, kInt64 };

  // Kept from one step to the next, and found out anew when a fingerprint has changed.
  uint64_t fingerprint = kNoFingerprint;  // of the param, its states and step together
  uint64_t grad_form = kNoFingerprint;    // of the grad
  int64_t grad_offset = 0;                // bytes from the grad's storage to its memory
  void* step = nullptr;  // the count, or for optimizers without one its stand-in on a GPU
  // To a param with a float32 master, counted when the last step had been made.
  int64_t writes = kNotCounted;
  const void* checked_grad = nullptr;  // the grad's memory, when it was compared with all others'
  StepType step_type = StepType::kFloat32;
  bool step_on_gpu = false;
  bool counts_steps = false;
  StochasticRounding rounding = StochasticRounding::kNone;  // as its group has it
  uint8_t device = kIdle;     // as in ParamUpdate, whether there is a grad or not
  bool is_fresh = false;      // its first state was created here, and not loaded
  bool recognizable = false;  // equal fingerprints mean that the update stands
  bool is_disjoint = false;   // what the update writes has been compared with all others'
  bool reads_others = false;  // the grad is memory of another parameter

  // Of the step that is being made.
  bool is_complete = false;  // its state lacks nothing
  bool is_first = false;     // its state is new
  double next_step = 0;      // the count after it
};

// The rows that an update is of, as Layout has them.
struct Rows {
  const int64_t* numbers = nullptr;
  int64_t count = 0;
};

// One entry for each parameter, in the order of the groups; kept from step to step.
struct ParamTable {
  std::vector<ParamUpdate> updates;
  std::vector<ParamCache> caches;
  std::vector<Dims> dims;                   // of updates that are not dense
  std::vector<Rows> rows;                   // and which rows they are of
  std::vector<cuda::StepCounter> counters;  // of this step, if GPUs count
  // How DTensors, and their states, lie over devices; empty if there have been none.
  std::vector<std::array<pybind11::object, kMaxTensors>> specs;
  // What was found out of all parameters together, until one of them changes.
  bool is_disjoint = false;    // no memory is written twice
  bool is_chunked = false;     // the plan's chunks fit the updates
  bool is_classified = false;  // which grads are added up over which processes; see GradNorm
  // What combine_sums() (torch_api.h) needs to know of that; None if all are this process's.
  pybind11::object reductions = pybind11::none();

  bool is_dtensor(size_t at) const { return !specs.empty() && specs[at][kParam]; }

  const Dims* dims_of(const ParamUpdate& update) const {  // nullptr: it is dense
    const auto layout = static_cast<size_t>(update.layout);
    return update.layout == kDense || layout >= dims.size() ? nullptr : &dims[layout];
  }
  bool is_of_rows(const ParamUpdate& update) const {
    return dims_of(update) != nullptr &&
           rows[static_cast<size_t>(update.layout)].numbers != nullptr;
  }
  std::vector<Layout> layouts() const {
    std::vector<Layout> all;
    for (size_t i = 0; i < dims.size(); ++i)
      all.push_back(
          {dims[i].data(), static_cast<int>(dims[i].size()), rows[i].numbers, rows[i].count});
    return all;
  }
};

}  // namespace fusedopt
