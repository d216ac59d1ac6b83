#include "bindings/grad_norm.h"

#include <cmath>
#include <cstring>

#include "bindings/scalars.h"
#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// A GradStatus as words of an int64 tensor; what a device has summed, a NormSums of each class,
// follows.
constexpr int64_t kStatusWords = sizeof(GradStatus) / sizeof(int64_t);

GradStatus read_status(const py::object& numbers) {
  const py::object copy = numbers.attr("cpu")();
  GradStatus status;
  std::memcpy(&status, data_of_numbers(copy), sizeof(status));
  return status;
}

[[noreturn]] void raise_nonfinite(const GradStatus& status, bool is_given) {
  const std::string count =
      is_given ? "" : ", with " + std::to_string(status.nonfinite) + " infinite or NaN elements";
  throw std::runtime_error("the norm of the grads is " +
                           std::string(py::str(py::float_(status.grad_norm))) + count +
                           ", so nothing was changed; to skip such steps instead, set "
                           "error_if_nonfinite=False");
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

bool GradNorm::measure(const ParamTable& table, const Step& on_cpu, const Pass& pass) {
  std::vector<cuda::DeviceStep>& devices = pass.on_gpus.devices;
  const int64_t num_classes =
      table.reductions.is_none() ? 1 : static_cast<int64_t>(py::len(table.reductions));
  const bool is_alone = table.reductions.is_none() && pass.call.norm_groups.empty() &&
                        devices.size() + (pass.context.has_cpu ? 1 : 0) <= 1;

  // A tensor for each device, the CPU first.
  std::vector<py::object> numbers;
  std::vector<NormSums*> sums;
  const auto add_device = [&](int gpu) {
    int64_t* data = nullptr;
    numbers.push_back(new_numbers(gpu, kStatusWords + num_classes * kNormWords, data));
    sums.push_back(reinterpret_cast<NormSums*>(data + kStatusWords));
    return reinterpret_cast<GradStatus*>(data);
  };
  GradStatus* const status_on_cpu =
      pass.context.has_cpu || devices.empty() ? add_device(-1) : nullptr;
  if (status_on_cpu != nullptr) {
    const py::gil_scoped_release release;
    cpu::sum_squares(on_cpu, isa_, pass.call.num_threads, sums.front(), num_classes);
  }
  for (cuda::DeviceStep& device : devices) {
    device.status = add_device(device.gpu);
    device.norm_sums = sums.back();
    device.num_classes = num_classes;
    pass.gpus.sum_squares(device);
  }
  if (!is_alone) combine(table, pass, numbers, sums);
  if (status_on_cpu != nullptr)
    *status_on_cpu =
        finalize_norm(*sums.front(), highest_bins(*sums.front()), pass.call.grads.scale,
                      /*found_inf=*/false, pass.context.clips);
  for (size_t i = 0; i < devices.size(); ++i) {
    devices[i].norm_sums = sums[numbers.size() - devices.size() + i];
    pass.gpus.finalize_norm(devices[i]);
  }
  return conclude(pass, numbers);
}

bool GradNorm::use_given(const Pass& pass) {
  const StepCall& call = pass.call;
  std::vector<py::object> numbers;
  const auto add_device = [&](int gpu) {
    const py::object scale =
        call.grad_scale.is_none() ? py::float_(call.grads.scale) : call.grad_scale;
    numbers.push_back(new_status(gpu, kStatusWords, status_fields(), call.grad_norm, scale,
                                 gpu < 0 ? py::none() : call.found_inf));
    return reinterpret_cast<GradStatus*>(data_of_numbers(numbers.back()));
  };
  if (pass.context.has_cpu || pass.on_gpus.devices.empty()) add_device(-1);
  for (cuda::DeviceStep& device : pass.on_gpus.devices) device.status = add_device(device.gpu);
  return conclude(pass, numbers);
}

// What follows from the status of each device, of which the host waits for the first if it has to
// know.
bool GradNorm::conclude(const Pass& pass, const std::vector<py::object>& numbers) {
  StepCall& call = pass.call;
  const bool uses_cpu = numbers.size() > pass.on_gpus.devices.size();
  set_status(numbers.front());  // from now on, other threads may read it
  for (const py::object& tensor : numbers) pass.gpus.keep(tensor, pass.context, pass.on_gpus);

  const bool errs = pass.context.any_group(&GroupOptions::errs_if_nonfinite);
  if (!uses_cpu && !errs) return true;
  const GradStatus status = read_status(numbers.front());
  const bool is_given = !call.grad_norm.is_none();
  const bool is_bad = status.nonfinite > 0 || is_nonfinite(status.grad_norm);
  // Of a scaler's scale.
  const bool is_overflow = call.checks_grads && (is_given || status.nonfinite > 0);
  if (errs && is_bad && !is_overflow && !call.has_found_inf()) raise_nonfinite(status, is_given);
  call.grads.norm = status.grad_norm;
  return !(status.skip > 0);
}

// Replaces what each device has summed by what all devices, and all processes that share the
// params, have.
void GradNorm::combine(const ParamTable& table, const Pass& pass,
                       const std::vector<py::object>& numbers, std::vector<NormSums*>& sums) {
  py::list own;
  for (const py::object& tensor : numbers)
    own.append(tensor[py::slice(kStatusWords, py::len(tensor), 1)]);
  py::handle param;  // one that every process has, whether or not it has a grad here
  for (const Group& group : pass.context.groups)
    if (!param && group.size() > 0) param = PyTuple_GET_ITEM(group.params.ptr(), 0);
  const py::list combined =
      combine_sums(own, table.reductions, pass.call.norm_groups, param ? param : py::none());
  for (size_t i = 0; i < sums.size(); ++i) {
    pass.gpus.keep(combined[i], pass.context, pass.on_gpus);
    sums[i] = reinterpret_cast<NormSums*>(data_of_numbers(combined[i]));
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
