// What the passes of a step hand to each other, beside the table: the call, and what has been found
// out of the param groups. Nothing of it is kept.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "bindings/group_options.h"
#include "core/step_scalars.h"

namespace fusedopt {

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

// A call of step(), over both of its collections.
struct StepCall {
  // What it asks for.
  pybind11::object param_groups, state;
  // torch.amp.GradScaler's part: None, or tensors on a GPU.
  pybind11::object grad_scale, found_inf;
  pybind11::list norm_groups;  // process groups over which the sums of grads are added up
  pybind11::object grad_norm;  // that the caller knows, or None
  int num_threads;
  bool checks_grads;
  // How far it has come.
  GradInfo grads = {};       // what the host knows of them
  bool is_measured = false;  // the norm of the grads is known
  bool has_run = false;      // something may have been written

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
  bool in_order = false;         // the order of the parameters counts
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
