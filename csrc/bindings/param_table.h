#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <map>
#include <utility>
#include <vector>

#include "bindings/fingerprint.h"
#include "bindings/optimizers.h"
#include "core/gpu.h"
#include "core/overlap.h"
#include "core/step.h"

// What a step works on, as plain data. Collector (collect.h) fills it in; the other passes of a
// step (scalars.h, aliases.h, grad_norm.h, gpu_steps.h) read it and add what they find out.
namespace fusedopt {

// A number of writes that no tensor has.
inline constexpr int64_t kNotCounted = -2;

// What is kept of a parameter from one step to the next, beside its ParamUpdate.
struct ParamCache {
  enum class StepType : uint8_t { kFloat32, kFloat64, kInt64 };

  uint64_t fingerprint = kNoFingerprint;  // of the param, its states and step together
  uint64_t grad_form = kNoFingerprint;    // of the grad
  int64_t grad_offset = 0;                // bytes from the grad's storage to its memory
  void* step = nullptr;  // the count, or for optimizers without one its stand-in on a GPU
  double next_step = 0;
  // To a param with a float32 master, counted when the last step had been made.
  int64_t writes = kNotCounted;
  const void* checked_grad = nullptr;  // the grad's memory, when it was compared with all others'
  StepType step_type = StepType::kFloat32;
  bool step_on_gpu = false;
  bool counts_steps = false;
  StochasticRounding rounding = StochasticRounding::kNone;  // as its group has it
  uint8_t device = kIdle;     // as in ParamUpdate, whether there is a grad or not
  bool is_complete = false;   // in this step, its state lacks nothing
  bool is_first = false;      // its state is new
  bool is_fresh = false;      // its first state was created here, and not loaded
  bool recognizable = false;  // equal fingerprints mean that the update stands
  bool is_disjoint = false;   // what the update writes has been compared with all others'
  bool reads_others = false;  // the grad is memory of another parameter
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

// A param group in one step.
struct Group {
  pybind11::object dict;
  pybind11::object params;  // a tuple
  GroupOptions options;
  HyperParams host_values = options.source.values;  // for parameters on the CPU

  // The indices of the scalars of each (number of the step, whether the state is new) that occurs;
  // those of the parameter before fit the next one as a rule.
  using StepKey = std::pair<double, bool>;
  std::map<StepKey, int32_t> scalars = {};
  StepKey last_key = {-1, false};
  int32_t last_scalars = -1;

  Py_ssize_t size() const { return PyTuple_GET_SIZE(params.ptr()); }
};

// What step() is asked for.
struct StepRequest {
  pybind11::object param_groups, state;
  // torch.amp.GradScaler's part: None, or tensors on a GPU.
  pybind11::object grad_scale, found_inf;
  pybind11::list norm_groups;  // process groups over which the sums of grads are added up
  pybind11::object grad_norm;  // that the caller knows, or None
  GradInfo grads;              // what the host knows of them
  int num_threads;
  bool checks_grads;
  bool is_measured = false;  // the norm of the grads is known

  bool is_scaled_on_gpu() const { return !grad_scale.is_none() || !found_inf.is_none(); }
  // Whether the scaler has found infinite grads itself and asks for the step to be skipped. Waits
  // for the GPU.
  bool has_found_inf() const {
    return !found_inf.is_none() && pybind11::float_(found_inf).cast<double>() > 0;
  }
};

// What is found out in one step, and is not kept.
struct StepContext {
  std::vector<Group> groups = {};
  bool is_second = false;        // state that was missing has been created for this step
  bool clips = false;            // a group limits the norm of the grads
  bool has_masters = false;      // in float32
  bool has_cpu = false;          // parameters to step there
  bool has_gpu_counts = false;   // step counts that only a GPU knows
  bool counts_on_gpu = false;    // GPUs count the steps of their parameters and compute the scalars
  bool is_captured = false;      // into a CUDA graph
  std::vector<bool> gpus = {};   // with parameters to step, by number
  pybind11::list missing;        // (group, index) of params whose state lacks something
  pybind11::list maybe_written;  // of params that others may have written to, and not to the master
  std::vector<Scalars> scalars = {};
  struct ScalarsKey {
    size_t group;
    Group::StepKey step;
  };
  std::vector<ScalarsKey> scalars_keys = {};  // what each of them is for

  bool any_group(bool GroupOptions::* option) const {
    return std::any_of(groups.begin(), groups.end(),
                       [=](const Group& group) { return group.options.*option; });
  }
};

}  // namespace fusedopt
