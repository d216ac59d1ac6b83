// Powers with a whole exponent, for bias corrections.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace fusedopt {

// base^exponent for a base in [0, 1], by repeated squaring in pairs of doubles. It is as accurate
// as pow() of the libraries, but the bits are the same on host and device, where those of the
// libraries differ.
FUSEDOPT_HD double power(double base, uint64_t exponent) {
  struct Pair {
    double high, low;
    FUSEDOPT_HD Pair times(const Pair& other) const {
      const double product = high * other.high;
      const double error =
          std::fma(high, other.high, -product) + (high * other.low + low * other.high);
      const double sum = product + error;
      return {sum, error - (sum - product)};
    }
  };
  Pair result = {1, 0};
  for (Pair square = {base, 0}; exponent != 0; square = square.times(square), exponent >>= 1)
    if ((exponent & 1) != 0) result = result.times(square);
  return result.high;
}

}  // namespace fusedopt
