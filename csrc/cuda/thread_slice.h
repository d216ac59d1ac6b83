#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fusedopt::cuda {

// A thread among those that share a piece of a work.
struct ThreadSlice {
  uint32_t rank;
  uint32_t size;
};

// Of numbers that are not negative; `is_small`: they fit 31 bits. A division of 64 bits takes much
// longer.
FUSEDOPT_HD int64_t divide(int64_t number, int64_t divisor, bool is_small) {
  if (is_small) return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  return number / divisor;
}

}  // namespace fusedopt::cuda
