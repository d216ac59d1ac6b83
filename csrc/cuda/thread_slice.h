// What kernels share for dividing elements among threads, and for finding elements in strided
// tensors.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fusedopt::cuda {

// A thread's place among those that do a chunk together: thread `rank` of `size`, which are a warp
// or a block.
struct ThreadSlice {
  uint32_t rank;
  uint32_t size;
};

// Divides non-negative integers. With `is_small` both fit 31 bits, and a 32-bit division does: GPUs
// have no instruction for division, and one of 64 bits takes much longer.
FUSEDOPT_HD int64_t divide(int64_t number, int64_t divisor, bool is_small) {
  if (is_small) return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  return number / divisor;
}

}  // namespace fusedopt::cuda
