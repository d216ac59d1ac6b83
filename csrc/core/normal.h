// The smallest normal numbers, and tests that hold for subnormal numbers where these are flushed.
#pragma once

#include <cstdint>
#include <limits>

#include "core/bits.h"
#include "core/macros.h"

namespace fusedopt {

// Where subnormal numbers are flushed, all that is smaller than this counts as 0.
template <class T>
inline constexpr T kSmallestNormal = std::numeric_limits<T>::min();

// Compares bits, so it is also true for a subnormal number, which a comparison takes for 0 where
// such numbers are flushed.
FUSEDOPT_HD bool is_positive(double number) { return bit_cast<int64_t>(number) > 0; }

}  // namespace fusedopt
