// A step's part on GPUs: what the CUDA driver is handed, and what holds the memory of that.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "bindings/param_table.h"
#include "bindings/step_call.h"
#include "core/gpu.h"

namespace fusedopt {

// One step on all GPUs.
struct GpuStep {
  std::vector<cuda::DeviceStep> devices = {};
  std::vector<cuda::HyperParamsRef> groups = {};
  std::vector<pybind11::object> kept = {};  // copies of the scaling tensors, where they are read
};

class Gpus {
 public:
  // Whether the step is being captured into a CUDA graph; raises RuntimeError if it cannot be.
  static bool is_captured(const StepContext& context);

  // All that can fail of what the GPUs are to do. `layouts` are borrowed until the launch.
  GpuStep prepare(const StepCall& call, ParamTable& table, const StepContext& context,
                  const std::vector<Layout>& layouts, bool reads_grads);

  // What reads the grads before the launch, on one GPU (core/gpu.h).
  void sum_squares(const cuda::DeviceStep& device_step);
  void finalize_norm(const cuda::DeviceStep& device_step);

  void launch(const GpuStep& step);

  // Holds a tensor that a GPU reads or writes: for the step, or for good if the step is captured
  // and may be replayed.
  void keep(const pybind11::object& tensor, const StepContext& context, GpuStep& step);

 private:
  std::unique_ptr<cuda::Driver> driver_;  // made when it is needed
  std::vector<pybind11::object> captured_;
  std::vector<std::shared_ptr<void>> first_steps_;  // see count_first_steps()
};

}  // namespace fusedopt
