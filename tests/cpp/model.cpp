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
  for_each_rule([&](RuleId rule) { model.scalars.push_back(problems_of(rule).back().scalars); });
  return model;
}

Borrowed::Borrowed(Model& model) {
  for (Tensor& tensor : model.tensors) {
    Work work = make_work(tensor.problem, tensor.buffers);
    work.scalars = tensor.scalars;
    work.device = tensor.idle ? kIdle : static_cast<uint8_t>(kFirstGpu + tensor.gpu);
    if (work.layout != kDense) {
      const Dims& dims = tensor.problem.dims;
      work.layout = static_cast<int32_t>(layouts_.size());
      layouts_.push_back({dims.data(), static_cast<int>(dims.size())});
    }
    works_.push_back(work);
  }
}

cuda::Share Borrowed::share(const Model& model, int gpu) const {
  cuda::Share share = {};
  share.gpu = gpu;
  share.works = works_.data();
  share.num_works = static_cast<int64_t>(works_.size());
  share.layouts = layouts_.data();
  share.num_layouts = static_cast<int64_t>(layouts_.size());
  share.scalars = model.scalars.data();
  share.num_scalars = static_cast<int64_t>(model.scalars.size());
  return share;
}

void Borrowed::step_on_cpu(const Model& model) {
  std::vector<int64_t> sizes;
  for (Work& work : works_) {
    if (work.device != kIdle) work.device = kCpu;
    sizes.push_back(work.numel);
  }
  const auto chunks = plan_chunks(sizes, kMinChunkElements);
  const Step step = {works_.data(), model.scalars.data(), layouts_.data(), chunks.data(),
                     static_cast<int64_t>(chunks.size()) - 1};
  cpu::run(step, cpu::Isa::kBaseline, 1);
}

void step_on_cpu(Model& model) { Borrowed(model).step_on_cpu(model); }
