// See model.h.

#include "model.h"

#include <algorithm>

using namespace fusedopt;

void Model::add(const Problem& problem, int gpu, int number) {
  const auto seed = static_cast<uint32_t>(tensors.size() + 1);
  tensors.push_back({problem, make_buffers(problem, seed), gpu, number});
}

bool Model::has_values_of(const Model& other) const {
  const auto same = [](const Tensor& a, const Tensor& b) { return a.buffers == b.buffers; };
  return std::equal(tensors.begin(), tensors.end(), other.tensors.begin(), other.tensors.end(),
                    same);
}

Model empty_model() {
  Model model;
  for (int kind = 0; kind < kNumKinds; ++kind)
    model.scalars.push_back(problems_of(kind).back().scalars);
  return model;
}

Borrowed::Borrowed(Model& model) {
  for (Tensor& tensor : model.tensors) {
    ParamUpdate update = make_update(tensor.problem, tensor.buffers);
    update.scalars = tensor.scalars;
    update.device = tensor.idle ? kIdle : static_cast<uint8_t>(kFirstGpu + tensor.gpu);
    if (update.layout != kDense) {
      const Dims& dims = tensor.problem.dims;
      update.layout = static_cast<int32_t>(layouts_.size());
      layouts_.push_back({dims.data(), static_cast<int>(dims.size())});
    }
    updates_.push_back(update);
  }
}

cuda::DeviceStep Borrowed::device_step(const Model& model, int gpu) const {
  cuda::DeviceStep device_step = {};
  device_step.gpu = gpu;
  device_step.updates = updates_.data();
  device_step.num_updates = static_cast<int64_t>(updates_.size());
  device_step.layouts = layouts_.data();
  device_step.num_layouts = static_cast<int64_t>(layouts_.size());
  device_step.scalars = model.scalars.data();
  device_step.num_scalars = static_cast<int64_t>(model.scalars.size());
  return device_step;
}

void Borrowed::step_on_cpu(const Model& model) {
  std::vector<int64_t> sizes;
  for (ParamUpdate& update : updates_) {
    if (update.device != kIdle) update.device = kCpu;
    sizes.push_back(update.numel);
  }
  const auto chunks = plan_chunks(sizes, kMinChunkElements);
  const Step step = {updates_.data(), model.scalars.data(), layouts_.data(), chunks.data(),
                     static_cast<int64_t>(chunks.size()) - 1};
  cpu::run(step, cpu::Isa::kBaseline, 1);
}

void step_on_cpu(Model& model) { Borrowed(model).step_on_cpu(model); }
