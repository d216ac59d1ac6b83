#pragma once

#include <cstdint>
#include <limits>

#include "core/bits.h"
#include "core/macros.h"

namespace fusedopt {

// Smaller numbers than this count as 0 where subnormal ones are flushed.
template <class T>
inline constexpr T kSmallestNormal = std::numeric_limits<T>::min();

// Also for a number that comparisons take for 0, being subnormal.
FUSEDOPT_HD bool is_positive(double number) { return bit_cast<int64_t>(number) > 0; }

}  // namespace fusedopt
