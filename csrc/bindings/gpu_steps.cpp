#include "bindings/gpu_steps.h"

#include "bindings/scalars.h"
#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Calls visit(number) for the GPUs that have parameters to step.
template <class Visit>
void for_each_gpu(const StepContext& context, const Visit& visit) {
  for (size_t gpu = 0; gpu < context.gpus.size(); ++gpu)
    if (context.gpus[gpu]) visit(static_cast<int>(gpu));
}

}  // namespace

bool Gpus::is_captured(const StepContext& context) {
  bool is_captured = false, are_all = true;
  for_each_gpu(context, [&](int gpu) {
    const bool is_this = cuda::is_capturing(gpu, current_stream(gpu));
    is_captured = is_captured || is_this;
    are_all = are_all && is_this;
  });
  if (!is_captured) return false;
  if (!are_all)
    throw std::runtime_error(
        "step() is captured into a CUDA graph on some of its GPUs only; let the current streams of "
        "the others wait for the one that is captured (Stream.wait_stream) first");
  for (size_t g = 0; g < context.groups.size(); ++g) {
    if (!context.groups[g].options.capturable)
      throw std::runtime_error(
          "step() is captured into a CUDA graph, but capturable is False in param group " +
          std::to_string(g) + "; construct the optimizer with capturable=True or set it there");
    if (context.groups[g].options.errs_if_nonfinite)
      throw std::runtime_error(
          "step() is captured into a CUDA graph, but error_if_nonfinite is True in param group " +
          std::to_string(g) + ", for which the host would have to wait in every replay");
  }
  if (context.has_cpu)
    throw std::runtime_error(
        "step() is captured into a CUDA graph, but some parameters are on the CPU");
  return true;
}

GpuStep Gpus::prepare(const StepCall& call, ParamTable& table, const StepContext& context,
                      const std::vector<Layout>& layouts, bool reads_grads) {
  GpuStep step;
  if (context.counts_on_gpu) {
    for (const Group& group : context.groups) step.groups.push_back(group.options.source);
    // State has been created for a step that GPUs may skip.
    if (context.is_second && (reads_grads || !call.found_inf.is_none()))
      count_first_steps(table, context, first_steps_);
  }
  for_each_gpu(context, [&](int gpu) {
    const auto read = [&](const py::object& tensor) -> const float* {
      if (tensor.is_none()) return nullptr;
      step.kept.push_back(tensor);
      return float_on_gpu(step.kept.back(), gpu);
    };
    cuda::DeviceStep device = {};
    device.gpu = gpu;
    device.stream = current_stream(gpu);
    device.updates = table.updates.data();
    device.num_updates = static_cast<int64_t>(table.updates.size());
    device.layouts = layouts.data();
    device.num_layouts = static_cast<int64_t>(layouts.size());
    device.scalars = context.scalars.data();
    device.num_scalars = static_cast<int64_t>(context.scalars.size());
    device.counters = context.counts_on_gpu ? table.counters.data() : nullptr;
    device.groups = step.groups.data();
    device.num_groups = static_cast<int64_t>(step.groups.size());
    device.grad_scale = read(call.grad_scale);
    device.host_grad_scale = call.grads.scale;
    device.found_inf = read(call.found_inf);
    device.reads_grads = reads_grads;
    device.clips = context.clips;
    step.devices.push_back(device);
  });
  if (step.devices.empty()) return step;
  if (driver_ == nullptr) driver_ = cuda::make_driver(allocate);
  for (const cuda::DeviceStep& device : step.devices) driver_->prepare(device);
  return step;
}

// A full queue makes a launch wait, so other threads of Python may run.
void Gpus::sum_squares(const cuda::DeviceStep& device_step) {
  const py::gil_scoped_release release;
  driver_->sum_squares(device_step);
}

void Gpus::finalize_norm(const cuda::DeviceStep& device_step) {
  const py::gil_scoped_release release;
  driver_->finalize_norm(device_step);
}

void Gpus::launch(const GpuStep& step) {
  const py::gil_scoped_release release;
  for (const cuda::DeviceStep& device : step.devices) driver_->launch(device);
}

void Gpus::keep(const py::object& tensor, const StepContext& context, GpuStep& step) {
  step.kept.push_back(tensor);
  if (context.is_captured) captured_.push_back(tensor);
}

}  // namespace fusedopt
