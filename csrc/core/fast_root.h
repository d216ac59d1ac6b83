#pragma once

#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// Square roots as IEEE 754 has them, by multiplications: a CPU has one slow unit for roots and
// divisions, which steps would wait for. Goldschmidt's iteration from the processor's estimate of
// 14 bits, then one correction by the exact remainder. A test compares all floats with the
// processor's own roots. Subnormals count as zero.
struct FastRoot {
  template <class V>
  FUSEDOPT_HD V sqrt(V x) const {
    // Numbers are brought to where nothing below becomes subnormal or infinite.
    const auto is_large = x > V(0x1p64f);
    const V scaled = x * select(is_large, V(0x1p-38f), V(0x1p26f));
    const V y = reciprocal_root_estimate(scaled);
    V root = scaled * y, half_y = V(0.5f) * y;
    const V error = fma(-root, half_y, V(0.5f));
    root = fma(root, error, root);
    half_y = fma(half_y, error, half_y);
    const V remainder = fma(-root, root, scaled);
    root = fma(remainder, half_y, root) * select(is_large, V(0x1p19f), V(0x1p-13f));
    return select(x * x == x, x, root);  // zeros of either sign, infinity, and 1
  }

  template <class V>
  FUSEDOPT_HD V divide(V numerator, V denominator) const {
    return numerator / denominator;
  }
};

}  // namespace fusedopt
