// States in 8 bits (`state_dtype="q8"`): a code for each element, and a float32 scale for each
// group of kGroup consecutive ones.
//
//   signed:    value = sign scale (code / 127)^2       codes -127 to 127
//   positive:  value = scale (code / 255)^4            codes 0 to 255, for what is never negative
//
// The scale is the largest magnitude of the group. It is a float32, because a narrower one could
// not follow a decay of 0.1 % a step. The powers make small codes fine: a second moment of 2e-10 of
// its group's largest has a code of its own, and one above 0 never becomes 0, which would make its
// update explode.
//
// A code is the number of thresholds that a magnitude is above. Threshold number c lies between the
// values of codes c and c + 1: halfway, as codes count, for rounding to nearest; or anywhere, by a
// draw, so that the mean of the two values is right. Moments are drawn as a rule: to nearest, one
// would stay where it is in relation to its group if a step changes it by less than half a code. A
// step with a beta2 of 0.999 does so with most second moments, and one with a beta1 of 0.9 with
// first moments below 10 codes, if their own grads are zeros. So a code follows from one element,
// one scale and one draw, by comparisons of floats: approximate roots, which differ from device to
// device, only say where to look.
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
  static constexpr int kMost = 127;
  static constexpr float kUnit = 1.0f / (127.0f * 127.0f);  // what code 1 stands for
  static constexpr float kRoot = kMost / 2.0f;              // over the root of 4
  static constexpr float kFirstDrawn = 0;  // from this code on thresholds are drawn

  template <class Float>
  static FUSEDOPT_HD Float power(Float code) {
    return code * code;
  }
  template <class Float, class Math>
  static FUSEDOPT_HD Float root(Math& math, Float x) {
    return math.about_root(x);
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
  template <class Float, class Bits>
  static FUSEDOPT_HD Bits finished(Float value, Bits code) {
    const Bits sign = Bits(0u) - (as_bits(value) >> 31);  // all bits of it
    return (code ^ sign) - sign;
  }
};

struct PositiveCode {
  static constexpr int kMost = 255;
  static constexpr float kUnit = 1.0f / (255.0f * 255.0f * 255.0f * 255.0f);
  static constexpr float kRoot = kMost / 1.41421356f;
  // Between codes below that, a draw could make a root twice or four times too small.
  static constexpr float kFirstDrawn = 4;

  template <class Float>
  static FUSEDOPT_HD Float power(Float code) {
    const Float square = code * code;
    return square * square;
  }
  template <class Float, class Math>
  static FUSEDOPT_HD Float root(Math& math, Float x) {
    return math.about_fourth_root(x);
  }

  template <class Float, class Bits>
  static FUSEDOPT_HD Float number(Bits code) {
    return as_float((code & 0xffu) | Bits(0x4b000000u)) - Float(0x1p23f);
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Float value(Bits code, float scale) {
    return power(number<Float>(code)) * Float(scale * kUnit);
  }
  // What is above 0 stays so.
  template <class Float, class Bits>
  static FUSEDOPT_HD Bits finished(Float value, Bits code) {
    const Float magnitude = as_float(as_bits(value) & 0x7fffffffu);
    return select(magnitude > Float(0), larger(code, Bits(1u)), Bits(0u));
  }
};

// Shares in (0, 1) for drawn thresholds, of the lower 16 bits of each word.
template <class Float, class Bits>
FUSEDOPT_HD Float threshold_shares(Bits draws) {
  const Float whole = as_float((draws & 0xffffu) | Bits(0x4b000000u)) - Float(0x1p23f);
  return (whole + Float(0.5f)) * Float(0x1p-16f);
}

// The codes of values, in the lowest byte of each word. `shares` are those of threshold_shares(),
// or not used without `is_drawn`. `scale` is that of the group, and not below any of its
// magnitudes.
template <class Code, class Float, class Math>
FUSEDOPT_HD auto encoded(const Float& values, float scale, bool is_drawn, const Float& shares,
                         Math& math) {
  using Bits = typename Lanes<Float>::Bits;
  constexpr float kMagic = 0x1.8p23f;  // added and taken off again, it rounds to whole numbers
  const Float magnitudes = as_float(as_bits(values) & 0x7fffffffu);
  const float over_scale = scale > 0 ? math.about_reciprocal(0.25f * scale) : 0.0f;
  // The code, or one less. That holds if roots are off by up to 1 / 1400, which is less than 0.2 of
  // a code: as codes count, a threshold is up to 0.1 further than its share, as its power is
  // convex.
  constexpr float kMargin = 0.3f;
  const Float about = Code::root(math, magnitudes * Float(over_scale)) * Float(Code::kRoot);
  Float below(kMargin);
  if (is_drawn && Code::kFirstDrawn == 0)
    below = shares + Float(kMargin - 0.5f);
  else if (is_drawn)
    below = select(about < Float(Code::kFirstDrawn), below, shares + Float(kMargin - 0.5f));
  Float code = (about - below + Float(kMagic)) - Float(kMagic);
  code = smaller(code, Float(Code::kMost - 1));
  if (Code::kFirstDrawn == 0) code = larger(code, Float(0));
  // The threshold above it.
  Float threshold = Code::power(code + Float(0.5f));
  if (is_drawn) {
    const Float low = Code::power(code);
    const Float drawn = fma(shares, Code::power(code + Float(1.0f)) - low, low);
    threshold = select(code < Float(Code::kFirstDrawn), threshold, drawn);
  }
  const auto is_above = magnitudes > threshold * Float(scale * Code::kUnit);
  const Bits word = as_bits(code + Float(kMagic)) + select(is_above, Bits(1u), Bits(0u));
  const Bits finished = Code::finished(values, word & 0xffu) & 0xffu;
  return either(scale == scale, finished, Bits(0u));
}

}  // namespace fusedopt
