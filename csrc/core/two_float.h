#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// A constant factor, exact to far below a float's last bit: two floats that add up to it. 0.999 or
// 1 - lr weight_decay as one float is off by up to 3e-8, always to the same side, and after
// thousands of steps that shows. Both parts have the factor's sign, so that infinity stays
// infinity.
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

FUSEDOPT_HD TwoFloat<double> two_float(double factor) {
  float high = static_cast<float>(factor);
  // The neighbour towards zero, as nextafter() gives it.
  if (high != 0 && std::fabs(high) >= std::fabs(factor))
    high = bit_cast<float>(bit_cast<uint32_t>(high) - 1);
  return {high, factor - high};
}

}  // namespace fusedopt
