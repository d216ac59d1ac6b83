#pragma once

#include "cuda/update.h"

// The update kernel, included by one source file for each format.
namespace fusedopt::cuda {

template <class Family, class Format>
__global__ void __launch_bounds__(kBlockThreads, Format::kMinBlocks)
    update_kernel(const __grid_constant__ UpdateArguments<Family, typename Format::T> arguments) {
  update_thread<Family, Format>(arguments, blockIdx.x, threadIdx.x);
}

template <class Format>
const void* update_kernel_of(RuleId rule) {
  return with_family(rule, [](auto family) {
    return reinterpret_cast<const void*>(&update_kernel<decltype(family), Format>);
  });
}

}  // namespace fusedopt::cuda
