#pragma once

#include <limits>

namespace fusedopt {

// Smaller numbers than this count as 0 where subnormal ones are flushed.
template <class T>
inline constexpr T kSmallestNormal = std::numeric_limits<T>::min();

}  // namespace fusedopt
