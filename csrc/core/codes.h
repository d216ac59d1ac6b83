// States in 8 bits (`state_dtype="q8"`): a code for each element, and a float32 scale for each
// group of kGroup consecutive ones.
//
//   signed:    value = sign scale (code / 127)^2       codes -127 to 127
//   positive:  value = scale (code / 255)^4            codes 0 to 255, for what is never negative
//
// The scale is the largest magnitude of the group. It is a float32, because a narrower one could
// not follow a decay of 0.1 % a step. The powers make small codes fine. A second moment above 0 has
// code 4 at least, which stands for 6e-8 of its group's largest: 0 would make its update explode,
// and between codes 1 to 4 a root would be up to four times too small.
//
// A code is the number of thresholds that a magnitude is above. Threshold number c lies between the
// values of codes c and c + 1: in the middle, for rounding to the nearest value; or at a share of
// the way that is drawn, so that the mean of the two values is right. Moments are drawn as a rule:
// to nearest, one would stay where it is in relation to its group if a step changes it by less than
// half the way. A step with a beta2 of 0.999 does so with most second moments, and one with a beta1
// of 0.9 with first moments below 10 codes, if their own grads are zeros. So a code follows from
// one element, one scale and one share, by comparisons of floats: approximate roots, which differ
// from device to device, only say where to look.
#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// Elements with one scale: consecutive ones of the tensor in the order of its dims.
inline constexpr int kGroup = 64;

FUSEDOPT_HD constexpr int64_t num_groups(int64_t elements) {
  return (elements + kGroup - 1) / kGroup;
}

// The scale of a group whose largest magnitude has these bits: 0 if all are 0, NaN if one is not
// finite, and so large that what code 1 stands for is no subnormal number.
FUSEDOPT_HD float scale_of(uint32_t largest) {
  constexpr float kSmallest = 0x1p-88f;
  if (largest == 0) return 0;
  if (largest >= 0x7f800000u) return __builtin_nanf("");
  return as_float(largest) < kSmallest ? kSmallest : as_float(largest);
}

// Roots and a reciprocal as encoded() asks for them, where it need not be fast.
struct ExactRoots {
  float about_root(float x) const { return square_root(x); }
  float about_fourth_root(float x) const { return square_root(square_root(x)); }
  float about_reciprocal(float x) const { return 1 / x; }
};

struct SignedCode {
  static constexpr int kLeast = 0, kMost = 127;
  static constexpr float kUnits = 127.0f * 127.0f;  // of what code 1 stands for, in the scale
  static constexpr float kUnit = 1 / kUnits;

  template <class Float>
  static FUSEDOPT_HD Float power(Float code) {
    return code * code;
  }
  // The threshold above a code, in units.
  template <class Float>
  static FUSEDOPT_HD Float threshold(Float code, Float shares) {
    const Float gap = fma(Float(2.0f), code, Float(1.0f));
    return fma(shares, gap, power(code));
  }
  template <class Float, class Math>
  static FUSEDOPT_HD Float root(Math& math, Float units) {
    return math.about_root(units);
  }

  // The code, a word's lowest byte, as a number.
  template <class Float, class Bits>
  static FUSEDOPT_HD Float number(Bits code) {
    constexpr float kZero = 0x1p23f + 128;
    return as_float(((code & 0xffu) ^ 0x80u) | Bits(0x4b000000u)) - Float(kZero);
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Float value(Bits code, float scale) {
    const Float number = SignedCode::number<Float>(code);
    return number * as_float(as_bits(number) & 0x7fffffffu) * Float(scale * kUnit);
  }

  template <class Float>
  static FUSEDOPT_HD Float magnitudes(Float values) {
    return as_float(as_bits(values) & 0x7fffffffu);
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Bits finished(Float values, Bits code) {
    const Bits sign = Bits(0u) - (as_bits(values) >> 31);  // all bits of it
    return (code ^ sign) - sign;
  }
};

struct PositiveCode {
  static constexpr int kLeast = 4, kMost = 255;  // but for 0
  static constexpr float kUnits = 255.0f * 255.0f * 255.0f * 255.0f;
  static constexpr float kUnit = 1 / kUnits;

  template <class Float>
  static FUSEDOPT_HD Float power(Float code) {
    const Float square = code * code;
    return square * square;
  }
  template <class Float>
  static FUSEDOPT_HD Float threshold(Float code, Float shares) {
    Float gap = fma(Float(4.0f), code, Float(6.0f));
    gap = fma(gap, code, Float(4.0f));
    gap = fma(gap, code, Float(1.0f));
    return fma(shares, gap, power(code));
  }
  template <class Float, class Math>
  static FUSEDOPT_HD Float root(Math& math, Float units) {
    return math.about_fourth_root(units);
  }

  template <class Float, class Bits>
  static FUSEDOPT_HD Float number(Bits code) {
    return as_float((code & 0xffu) | Bits(0x4b000000u)) - Float(0x1p23f);
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Float value(Bits code, float scale) {
    return power(number<Float>(code)) * Float(scale * kUnit);
  }

  template <class Float>
  static FUSEDOPT_HD Float magnitudes(Float values) {
    return values;
  }
  // What is above 0 stays so.
  template <class Float, class Bits>
  static FUSEDOPT_HD Bits finished(Float values, Bits code) {
    return select(values > Float(0.0f), code, Bits(0u));
  }
};

// Where thresholds lie between values: in the middle, or at shares in (0, 1) that are drawn by the
// lower 16 bits of each word.
template <class Float, class Bits>
FUSEDOPT_HD Float threshold_shares(Bits draws, bool are_drawn) {
  const Float from_2_to_23 = as_float((draws & 0xffffu) | Bits(0x4b000000u));
  return fma(from_2_to_23, Float(are_drawn ? 0x1p-16f : 0.0f),  // nothing is rounded
             Float(are_drawn ? 0x1p-17f - 128 : 0.5f));
}

// The codes of values, each in the lowest byte of a word; the other bytes have any bits. The scale
// of the group is positive and finite, and not below any of its magnitudes. Where a scale is 0 or
// NaN, all codes are 0, which is left to the caller.
template <class Code, class Float, class Math>
FUSEDOPT_HD auto encoded(const Float& values, float scale, const Float& shares, Math& math) {
  using Bits = typename Lanes<Float>::Bits;
  constexpr float kMagic = 0x1.8p23f;  // added, it rounds to whole numbers
  const Float magnitudes = Code::magnitudes(values);
  const float units = math.about_reciprocal(0.25f * scale) * (0.25f * Code::kUnits);
  // The code, or one less. That holds if roots are off by up to 1 / 1400, which is less than 0.2 of
  // a code: as codes count, a threshold is up to 0.25 further than its share, as its power is
  // convex.
  // (The largest of a group may get the code below its own, by the rounding of thresholds, where a
  // share is within 2^-16 of 1.)
  Float guess = Code::root(math, magnitudes * Float(units)) - shares;
  guess = smaller(guess + Float(kMagic), Float(kMagic + Code::kMost - 1));
  guess = larger(guess, Float(kMagic + Code::kLeast));
  const Float threshold = Code::threshold(guess - Float(kMagic), shares);
  const auto is_above = magnitudes > threshold * Float(scale * Code::kUnit);
  const Bits word = as_bits(guess);
  return Code::finished(values, select(is_above, word + Bits(1u), word));
}

}  // namespace fusedopt
