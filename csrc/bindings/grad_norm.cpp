#include "bindings/grad_norm.h"

#include <cmath>
#include <cstring>

#include "bindings/scalars.h"
#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// A GradStatus as doubles of one tensor; what a device has summed, [squares, nonfinite] of each
// class, follows.
constexpr int64_t kStatusNumbers = sizeof(GradStatus) / sizeof(double);

GradStatus read_status(const py::object& numbers) {
  const py::object copy = numbers.attr("cpu")();
  GradStatus status;
  std::memcpy(&status, data_of_numbers(copy), sizeof(status));
  return status;
}

[[noreturn]] void raise_nonfinite(const GradStatus& status) {
  throw std::runtime_error("the norm of the grads is " +
                           std::string(py::str(py::float_(status.grad_norm))) + ", with " +
                           std::to_string(status.nonfinite) +
                           " infinite or NaN elements, so nothing was changed; to skip such steps "
                           "instead, set error_if_nonfinite=False");
}

}  // namespace

void GradNorm::classify(ParamTable& table, const StepContext& context) {
  if (table.is_classified) return;
  for (ParamUpdate& update : table.updates) update.norm_class = 0;
  table.reductions = py::none();
  bool has_dtensors = false;
  for (size_t at = 0; at < table.updates.size(); ++at)
    has_dtensors = has_dtensors || table.is_dtensor(at);
  if (has_dtensors) {
    py::list params;
    for (const Group& group : context.groups)
      for (const py::handle param : group.params) params.append(param);
    const py::tuple classes = classify_params(params);
    const py::list of_params = classes[0];
    for (size_t at = 0; at < table.updates.size(); ++at)
      table.updates[at].norm_class = of_params[at].cast<uint8_t>();
    table.reductions = classes[1];
  }
  table.is_classified = true;
}

void GradNorm::sum_on_cpu(const ParamTable& table, int num_threads, double* totals,
                          int64_t num_classes) {
  std::vector<int64_t> sizes;
  for (const ParamUpdate& update : table.updates)
    sizes.push_back(update.device == kCpu ? update.numel : 0);
  if (leaves_.empty() || sizes != leaf_sizes_) {
    leaves_ = plan_leaves(sizes);
    leaves_.shrink_to_fit();
    leaf_sizes_.swap(sizes);
  }
  const std::vector<Layout> layouts = table.layouts();
  const py::gil_scoped_release release;
  const std::vector<PartialSum> sums =
      cpu::sum_squares(table.updates.data(), layouts.data(), leaves_, isa_, num_threads);
  for (int64_t c = 0; c < num_classes; ++c)
    sum_leaves(sums.data(), static_cast<int64_t>(sums.size()), static_cast<int32_t>(c),
               totals + 2 * c);
}

bool GradNorm::measure(const ParamTable& table, StepRequest& request, const StepContext& context,
                       GpuStep& step, Gpus& gpus) {
  const int64_t num_classes =
      table.reductions.is_none() ? 1 : static_cast<int64_t>(py::len(table.reductions));
  const bool is_alone = table.reductions.is_none() && request.norm_groups.empty() &&
                        step.devices.size() + (context.has_cpu ? 1 : 0) <= 1;

  // A tensor for each device, the CPU first.
  std::vector<py::object> numbers;
  std::vector<double*> data;
  const auto add_device = [&](int gpu) {
    data.push_back(nullptr);
    numbers.push_back(new_numbers(gpu, kStatusNumbers + 2 * num_classes, data.back()));
  };
  const bool uses_cpu = context.has_cpu || step.devices.empty();
  if (uses_cpu) {
    add_device(-1);
    sum_on_cpu(table, request.num_threads, data.back() + kStatusNumbers, num_classes);
  }
  for (cuda::DeviceStep& device : step.devices) {
    add_device(device.gpu);
    device.status = reinterpret_cast<GradStatus*>(data.back());
    device.totals = data.back() + kStatusNumbers;
    device.num_classes = num_classes;
    device.finalizes = is_alone;
    gpus.driver().sum_squares(device);
  }
  if (!is_alone) combine(table, request, context, step, gpus, numbers, data);
  if (uses_cpu) {
    const double* const totals = data.front() + kStatusNumbers;
    const GradStatus status =
        finalize_norm(totals[0], static_cast<int64_t>(totals[1]), request.grads.scale,
                      /*found_inf=*/false, context.clips);
    std::memcpy(data.front(), &status, sizeof(status));
  }
  set_status(numbers.front());  // from now on, other threads may read it
  for (const py::object& tensor : numbers) gpus.keep(tensor, context, step);

  const bool errs = context.any_group(&GroupOptions::errs_if_nonfinite);
  if (!uses_cpu && !errs) return false;
  const GradStatus status = read_status(numbers.front());
  const bool is_bad = status.nonfinite > 0 || is_nonfinite(status.grad_norm);
  const bool is_overflow = request.checks_grads && status.nonfinite > 0;  // of a scaler's scale
  if (errs && is_bad && !is_overflow && !request.has_found_inf()) raise_nonfinite(status);
  request.grads.norm = status.grad_norm;
  return status.skip > 0;
}

// Puts what all devices, and all processes that share the params, have summed into the first class
// of each.
void GradNorm::combine(const ParamTable& table, const StepRequest& request,
                       const StepContext& context, GpuStep& step, Gpus& gpus,
                       const std::vector<py::object>& numbers, const std::vector<double*>& data) {
  py::list totals;
  for (const py::object& tensor : numbers)
    totals.append(tensor[py::slice(kStatusNumbers, py::len(tensor), 1)]);
  py::handle param;  // one that every process has, whether or not it has a grad here
  for (const Group& group : context.groups)
    if (!param && group.size() > 0) param = PyTuple_GET_ITEM(group.params.ptr(), 0);
  const py::list combined =
      combine_totals(totals, table.reductions, request.norm_groups, param ? param : py::none());
  const bool uses_cpu = numbers.size() > step.devices.size();
  for (size_t i = 0; i < numbers.size(); ++i) {
    const py::object total = combined[i];
    if (uses_cpu && i == 0) {
      std::memcpy(data[0] + kStatusNumbers, data_of_numbers(total), 2 * sizeof(double));
      continue;
    }
    cuda::DeviceStep& device = step.devices[i - (uses_cpu ? 1 : 0)];
    gpus.keep(total, context, step);
    device.totals = const_cast<double*>(data_of_numbers(total));
    gpus.driver().finalize_norm(device);
  }
}

py::dict GradNorm::status_fields() {
  static_assert(sizeof(GradStatus::grad_norm) == 8 && sizeof(GradStatus::nonfinite) == 8 &&
                sizeof(GradStatus::skip) == 4);
  py::dict fields;
  fields["grad_norm"] = py::make_tuple(offsetof(GradStatus, grad_norm), "float64");
  fields["nonfinite"] = py::make_tuple(offsetof(GradStatus, nonfinite), "int64");
  fields["skip"] = py::make_tuple(offsetof(GradStatus, skip), "float32");
  return fields;
}

py::object GradNorm::status() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

void GradNorm::set_status(py::object status) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::swap(status_, status);
}

}  // namespace fusedopt
