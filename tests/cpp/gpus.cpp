#include "gpus.h"

#include <set>

#include "check.h"

using namespace fusedopt;
using namespace fusedopt::cuda;

void Gpus::step(Model& model, const Options& options) {
  auto borrowed = std::make_unique<Borrowed>(model);
  std::set<int> gpus;
  for (const Tensor& tensor : model.tensors) gpus.insert(tensor.gpu);
  std::vector<Share> shares;
  for (const int gpu : gpus) {
    Share share = borrowed->share(model, gpu);
    share.stream = options.stream;
    share.grad_scale = options.grad_scale;
    share.found_inf = options.found_inf;
    if (options.clocks != nullptr) {
      share.scalars = nullptr;
      share.num_scalars = 0;
      share.clocks = options.clocks->data();
      share.groups = options.groups->data();
      share.num_groups = static_cast<int64_t>(options.groups->size());
    }
    shares.push_back(share);
  }
  for (const Share& share : shares) driver_->prepare(share);
  for (const Share& share : shares) driver_->launch(share);
}

std::shared_ptr<void> Gpus::allocate(int gpu, int64_t bytes, Memory kind) {
  CHECK(gpu >= 0 && bytes >= 0);
  if (until_failure_ >= 0 && until_failure_-- == 0) throw std::runtime_error("out of memory");
  ++counts_[static_cast<size_t>(kind)];
  return device_memory(bytes);
}
