// What kernels share for dividing elements among threads, and for finding elements in strided
// tensors.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/macros.h"
#include "cuda/access.h"

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

// Calls f(d, dim, index) with the index along each dim, innermost first, of the element that a
// strided layout visits as number `element`. `is_small` as above, of all its numbers.
template <class F>
FUSEDOPT_HD void for_each_index(const Layout& layout, int64_t element, bool is_small, const F& f) {
#pragma unroll 1
  for (int d = layout.num_dims - 1; d >= 0; --d) {
    const Dim* const dim = layout.dims + d;
    const int64_t size = load_item(&dim->size);
    // All that is left is along the outermost dim, which is longer than the walk if that is of
    // rows.
    const int64_t outer = d == 0 ? 0 : divide(element, size, is_small);
    f(d, dim, element - outer * size);
    element = outer;
  }
}

}  // namespace fusedopt::cuda
