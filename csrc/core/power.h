// Powers that have the same bits everywhere: with a whole exponent, for bias corrections, and with
// any, for schedules that are part of a rule.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

namespace fusedopt {

// base^exponent for a base in [-1, 1], by repeated squaring in pairs of doubles. It is as accurate
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

// base^exponent = e^y for a base above 0 and any exponent, by the series of log() and exp(). The
// relative error is at most 1e-15 (1 + |y|). Above e^700 it is infinite, and below e^-700 it is 0.
// The bits are the same on host and device, as above.
FUSEDOPT_HD double real_power(double base, double exponent) {
  constexpr double kLog2 = 0x1.62e42fefa39efp-1, kLog2Rest = 0x1.abc9e3b39803fp-56;
  if (!(base > 0) || !(base < HUGE_VAL)) return base == 0 && exponent > 0 ? 0.0 : NAN;
  // base = 2^n m with m between the roots of 1/2 and 2, and log(m) = 2 artanh((m - 1) / (m + 1)).
  int64_t n = 0;
  double m = base;
  for (; m > 0x1.6a09e667f3bcdp0; m *= 0.5) ++n;
  for (; m < 0x1.6a09e667f3bcdp-1; m *= 2) --n;
  const double s = (m - 1) / (m + 1), square = s * s;
  double series = 0;
  for (int k = 25; k > 1; k -= 2) series = std::fma(series, square, 1.0 / k);
  const double log_m = std::fma(2 * s * square, series, 2 * s);
  const double whole = static_cast<double>(n);
  const double y = exponent * (whole * kLog2 + (whole * kLog2Rest + log_m));
  // exp(y) = 2^n exp(r) with r between -log(2) / 2 and log(2) / 2.
  if (!(y < 700)) return y > 0 ? HUGE_VAL : y;
  if (y < -700) return 0;
  const double doublings = std::floor(y / kLog2 + 0.5);
  const double r = std::fma(-doublings, kLog2Rest, std::fma(-doublings, kLog2, y));
  double result = 1;
  for (int k = 14; k > 0; --k) result = std::fma(result, r / k, 1.0);
  return result *
         bit_cast<double>(static_cast<uint64_t>(1023 + static_cast<int64_t>(doublings)) << 52);
}

}  // namespace fusedopt
