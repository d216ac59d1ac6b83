// See gpus.h.

#include "gpus.h"

#include <set>

#include "check.h"

using namespace fusedopt;
using namespace fusedopt::cuda;

void Gpus::step(Model& model, const Options& options) {
  auto borrowed = std::make_unique<Borrowed>(model);
  std::set<int> gpus;
  for (const Tensor& tensor : model.tensors) gpus.insert(tensor.gpu);
  std::vector<DeviceStep> device_steps;
  for (const int gpu : gpus) {
    DeviceStep device_step = borrowed->device_step(model, gpu);
    device_step.stream = options.stream;
    device_step.grad_scale = options.grad_scale;
    device_step.found_inf = options.found_inf;
    if (options.counters != nullptr) {
      device_step.scalars = nullptr;
      device_step.num_scalars = 0;
      device_step.counters = options.counters->data();
      device_step.groups = options.groups->data();
      device_step.num_groups = static_cast<int64_t>(options.groups->size());
    }
    device_steps.push_back(device_step);
  }
  for (const DeviceStep& device_step : device_steps) driver_->prepare(device_step);
  for (const DeviceStep& device_step : device_steps) driver_->launch(device_step);
}

std::shared_ptr<void> Gpus::allocate(int gpu, int64_t bytes, Memory kind) {
  CHECK(gpu >= 0 && bytes >= 0);
  if (until_failure_ >= 0 && until_failure_-- == 0) throw std::runtime_error("out of memory");
  ++counts_[static_cast<size_t>(kind)];
  return device_memory(bytes);
}
