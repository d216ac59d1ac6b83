#include <cmath>
#include <cstring>

#include "bindings/plan.h"
#include "bindings/torch_api.h"

// The part of Plan that finds out about the grads before a step: their global norm, and whether all
// of them are finite.
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

// Whether a GradScaler has found infinite grads itself, and asks for the step to be skipped.
bool Plan::skips_for(const Scaling& scaling) {
  return !scaling.found_inf.is_none() && py::float_(scaling.found_inf).cast<double>() > 0;
}

// Enters into the updates which sum their grads belong to. Returns what combine_totals() needs to
// know of them, or None if there is just one sum, of this process.
py::object Plan::classify_grads(const StepContext& context) {
  if (!context.has_subclasses) return py::none();
  py::list params;
  for (const Group& group : context.groups)
    for (const py::handle param : group.params) params.append(param);
  const py::tuple classes = classify(params);
  const py::list of_params = classes[0];
  for (size_t at = 0; at < updates_.size(); ++at)
    updates_[at].norm_class = of_params[at].cast<uint8_t>();
  return classes[1];
}

void Plan::sum_on_cpu(int num_threads, double* totals, int64_t num_classes) {
  std::vector<int64_t> sizes;
  for (const ParamUpdate& update : updates_)
    sizes.push_back(update.device == kCpu ? update.numel : 0);
  if (leaves_.empty() || sizes != leaf_sizes_) {
    leaves_ = plan_leaves(sizes);
    leaves_.shrink_to_fit();
    leaf_sizes_.swap(sizes);
  }
  std::vector<Layout> layouts;
  for (const Dims& dims : dims_) layouts.push_back({dims.data(), static_cast<int>(dims.size())});
  const py::gil_scoped_release release;
  const std::vector<PartialSum> sums =
      cpu::sum_squares(updates_.data(), layouts.data(), leaves_, isa_, num_threads);
  for (int64_t c = 0; c < num_classes; ++c)
    sum_leaves(sums.data(), static_cast<int64_t>(sums.size()), static_cast<int32_t>(c),
               totals + 2 * c);
}

// Reads all grads. What GPUs find out stays there unless the host has to know. Returns whether the
// step is to be skipped, as far as the host knows.
bool Plan::sum_squares(StepContext& context, const py::object& reductions, const Scaling& scaling,
                       Launches& launches, int num_threads, bool checks_grads) {
  const int64_t num_classes = reductions.is_none() ? 1 : static_cast<int64_t>(py::len(reductions));
  const bool is_alone =
      reductions.is_none() && launches.device_steps.size() + (context.has_cpu ? 1 : 0) <= 1;

  // A tensor for each device, the CPU first.
  std::vector<py::object> numbers;
  std::vector<double*> data;
  const auto add_device = [&](int gpu) {
    data.push_back(nullptr);
    numbers.push_back(new_numbers(gpu, kStatusNumbers + 2 * num_classes, data.back()));
  };
  const bool uses_cpu = context.has_cpu || launches.device_steps.empty();
  if (uses_cpu) {
    add_device(-1);
    sum_on_cpu(num_threads, data.back() + kStatusNumbers, num_classes);
  }
  for (cuda::DeviceStep& device_step : launches.device_steps) {
    add_device(device_step.gpu);
    device_step.status = reinterpret_cast<GradStatus*>(data.back());
    device_step.totals = data.back() + kStatusNumbers;
    device_step.num_classes = num_classes;
    device_step.finalizes = is_alone;
    driver_->sum_squares(device_step);
  }
  if (!is_alone) combine(launches, reductions, numbers, data);
  if (uses_cpu) {
    const double* const totals = data.front() + kStatusNumbers;
    const GradStatus status =
        finalize_norm(totals[0], static_cast<int64_t>(totals[1]), context.grads.scale,
                      /*found_inf=*/false, context.clips);
    std::memcpy(data.front(), &status, sizeof(status));
  }
  set_status(numbers.front());  // from now on, other threads may read it
  for (const py::object& tensor : numbers) {
    launches.kept.push_back(tensor);
    if (launches.captured) captured_.push_back(tensor);
  }

  const bool errs = std::any_of(context.groups.begin(), context.groups.end(),
                                [](const Group& group) { return group.errs_if_nonfinite; });
  if (!uses_cpu && !errs) return false;
  const GradStatus status = read_status(numbers.front());
  const bool is_bad = status.nonfinite > 0 || is_nonfinite(status.grad_norm);
  const bool is_overflow = checks_grads && status.nonfinite > 0;  // of a GradScaler's scale
  if (errs && is_bad && !is_overflow && !skips_for(scaling)) raise_nonfinite(status);
  context.grads.norm = status.grad_norm;
  if (context.clips && context.has_cpu) rescale(context);
  return status.skip > 0;
}

// Puts what all devices, and all processes that share the params, have summed into the first class
// of each.
void Plan::combine(Launches& launches, const py::object& reductions,
                   std::vector<py::object>& numbers, std::vector<double*>& data) {
  py::list totals;
  for (const py::object& tensor : numbers)
    totals.append(tensor[py::slice(kStatusNumbers, py::len(tensor), 1)]);
  const py::list combined = combine_totals(totals, reductions);
  const bool uses_cpu = numbers.size() > launches.device_steps.size();
  for (size_t i = 0; i < numbers.size(); ++i) {
    const py::object total = combined[i];
    if (uses_cpu && i == 0) {
      std::memcpy(data[0] + kStatusNumbers, data_of_numbers(total), 2 * sizeof(double));
      continue;
    }
    cuda::DeviceStep& device_step = launches.device_steps[i - (uses_cpu ? 1 : 0)];
    launches.kept.push_back(total);
    if (launches.captured) captured_.push_back(total);
    device_step.totals = const_cast<double*>(data_of_numbers(total));
    driver_->finalize_norm(device_step);
  }
}

}  // namespace fusedopt
