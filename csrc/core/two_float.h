// A constant factor as the sum of two floats, for decays: 0.999, or 1 - lr weight_decay, as one
// float is off by up to 3e-8, always to the same side, and after thousands of steps that shows.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// Exact to far below the last bit of a float. Both parts have the sign of the factor, so that
// infinity times the factor stays infinity and does not become NaN.
template <class T>
struct TwoFloat {
  T high;
  T rest;

  template <class V>
  FUSEDOPT_HD V times(V x) const {
    return fma(V(high), x, V(rest) * x);
  }

  template <class U>
  FUSEDOPT_HD TwoFloat<U> as() const {
    return {U(high), U(rest)};
  }
};

// Splits a factor: the first part is rounded towards zero, so the rest has the same sign.
FUSEDOPT_HD TwoFloat<double> two_float(double factor) {
  float high = static_cast<float>(factor);
  // The neighbouring float towards zero, as nextafter() would give it.
  if (high != 0 && std::fabs(high) >= std::fabs(factor))
    high = bit_cast<float>(bit_cast<uint32_t>(high) - 1);
  return {high, factor - high};
}

}  // namespace fusedopt
