#pragma once

#include <cmath>

#include "core/macros.h"

namespace fusedopt {

// A constant factor, exact to far below a float's last bit: two floats that add up to it. 0.999 or
// 1 - lr weight_decay as one float is off by up to 3e-8, always to the same side, and after
// thousands of steps that shows. Both parts have the factor's sign, so that infinity stays
// infinity.
template <class T>
struct Factor {
  T high;
  T rest;

  FUSEDOPT_HD T times(T x) const { return std::fma(high, x, rest * x); }

  template <class U>
  FUSEDOPT_HD Factor<U> as() const {
    return {U(high), U(rest)};
  }
};

inline Factor<double> split(double factor) {
  float high = static_cast<float>(factor);
  if (std::fabs(high) >= std::fabs(factor)) high = std::nextafter(high, 0.0f);
  return {high, factor - high};
}

}  // namespace fusedopt
