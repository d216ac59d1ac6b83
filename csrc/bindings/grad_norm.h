// Finds out about the grads before a step: their global norm, and whether all of them are finite.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <vector>

#include "bindings/gpu_steps.h"
#include "bindings/param_table.h"
#include "bindings/step_call.h"
#include "core/norm.h"

namespace fusedopt {

class GradNorm {
 public:
  explicit GradNorm(cpu::Isa isa) : isa_(isa) {}

  // Enters into the updates, and table.reductions, over which processes their grads are summed.
  void classify(ParamTable& table, const StepContext& context);

  // The step whose grads they are, and the GPUs that take part in it.
  struct Pass {
    StepCall& call;
    const StepContext& context;
    GpuStep& on_gpus;
    Gpus& gpus;
  };

  // Reads all grads and sets call.grads.norm, if the host has to know. What GPUs find out stays
  // there otherwise. Returns false if the step is to be skipped, as far as the host knows. Raises
  // RuntimeError for grads that are not finite if a group has error_if_nonfinite.
  bool measure(const ParamTable& table, const Step& on_cpu, const Pass& pass);

  // The same with a norm that the caller knows: no grad is read.
  bool use_given(const Pass& pass);

  // What the latest step found out: an int64 tensor whose memory begins with a GradStatus; None if
  // the grads were not read.
  pybind11::object status() const;
  void set_status(pybind11::object status);

  // (offset in bytes, name of a torch.dtype) of each field of a GradStatus, by its name.
  static pybind11::dict status_fields();

 private:
  bool conclude(const Pass& pass, const std::vector<pybind11::object>& numbers);
  static void combine(const ParamTable& table, const Pass& pass,
                      const std::vector<pybind11::object>& numbers, std::vector<NormSums*>& sums);

  const cpu::Isa isa_;
  mutable std::mutex mutex_;
  pybind11::object status_ = pybind11::none();
};

}  // namespace fusedopt
