// The CUDA driver with its kernels emulated, as tests step it.
#pragma once

#include <array>
#include <memory>
#include <stdexcept>
#include <vector>

#include "device_memory.h"
#include "model.h"

// The driver, and the memory that it asks for.
class Gpus {
 public:
  Gpus()
      : driver_(fusedopt::cuda::make_driver(
            [this](int gpu, int64_t bytes, auto kind) { return allocate(gpu, bytes, kind); })) {}

  // What a step is given besides the model.
  struct Options {
    void* stream = nullptr;
    const std::vector<fusedopt::cuda::StepCounter>* counters = nullptr;
    const std::vector<fusedopt::cuda::HyperParamsRef>* groups = nullptr;
    const float* grad_scale = nullptr;
    const float* found_inf = nullptr;
  };

  // Prepares the step on all devices, then launches it, as the bindings do. What the driver borrows
  // for the call is freed at the end, so that ASan sees a later use.
  void step(Model& model, const Options& options);
  void step(Model& model) { step(model, Options()); }

  // How often memory of this kind was asked for.
  int allocations(fusedopt::cuda::Memory kind) const { return counts_[static_cast<size_t>(kind)]; }

  // Lets the allocation after so many fail.
  void fail_in(int allocations) { until_failure_ = allocations; }

 private:
  std::shared_ptr<void> allocate(int gpu, int64_t bytes, fusedopt::cuda::Memory kind);

  std::array<int, 4> counts_ = {};
  int until_failure_ = -1;
  std::unique_ptr<fusedopt::cuda::Driver> driver_;
};
