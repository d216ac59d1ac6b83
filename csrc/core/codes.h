// States in 8 bits (`state_dtype="q8"`): a code for each element, and a float32 scale for each
// group of kGroup consecutive ones.
//
// Codes number places from 2^33 up. Within a binade, from one power of two to the next, they lie
// evenly, and the more densely the higher it is:
//
//   with a sign         codes  0 to  64:  16 in each of the first 4 binades
//                       codes 64 to 127:  32 in each of the next 2
//   what is never       codes  0 to  32:   8 in each of the first 4 binades
//   negative            codes 32 to  64:  16 in each of the next 2
//                       codes 64 to 255:  32 in each of those above
//
// A value is scale * (place - first place) / (last place - first place), where the scale is the
// group's largest magnitude. So 0 is exact, and values near it are evenly spaced, as subnormal
// numbers are. What is never negative, as second moments, has codes to 255;
// what has a sign has it in the upper bit and codes to 127 in the others. The scale is a float32,
// because a narrower one could not follow a decay of 0.1 % a step. A second moment above 0 has
// code 1 at least, which stands for 3.1e-5 of its group's largest: 0 would make its update explode.
//
// Read as an integer, the bits of a float grow linearly within a binade. So a code is a linear
// function of the bits of its place, with a slope for each density, and the slopes grow: the code
// is the largest of these lines, and the bits of a place are the smallest of the inverse lines.
// This takes neither roots nor tables nor branches, and is the same on all devices.
//
// A code is rounded by adding a fraction of one and cutting off: a half, for the nearest value, or
// one that is drawn, so that the mean of the two values is right. Moments are drawn as a rule: to
// nearest, one would stay where it is in relation to its group if a step changes it by less than
// half the way. A step with a beta2 of 0.999 does so with all second moments, and one with a beta1
// of 0.9 with first moments below 5 codes, if their own grads are zeros.
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
// finite, and so large that no number below is subnormal or overflows.
FUSEDOPT_HD float scale_of(uint32_t largest) {
  constexpr float kSmallest = 0x1p-80f;
  // By selections alone, as a GPU's branches cost registers.
  const uint32_t finite = larger(largest, bit_cast<uint32_t>(kSmallest));
  const uint32_t scale = largest >= 0x7f800000u ? 0x7fc00000u : finite;
  return as_float(largest == 0 ? 0u : scale);
}

inline constexpr float kFirstPlace = 0x1p33f;

// For codes of one density: the upper half of the bits of a place is (code << shift) + offset. The
// lower half is 0: all places are bfloat16 numbers, too.
struct Line {
  int shift;
  uint32_t offset;
};

// What codes with a sign and codes without differ in. kRange is how far the last place is from the
// first, and kUnit what a distance of 1 is of the scale, both rounded down: so whatever rounding
// makes of a group's largest magnitude, its code is the last one, and its value not above it.
struct SignedCode {
  static constexpr int kLines = 2;
  static FUSEDOPT_HD constexpr Line line(int j) {
    return j == 0 ? Line{3, 0x5000} : Line{2, 0x5100};
  }

  static constexpr bool kHasSign = true;
  static constexpr float kRange = 0x1p32f * (124 - 0x1p-17f);
  static constexpr float kUnit = 1 / (0x1p32f * (124 + 0x1p-16f));
  static constexpr uint32_t kMagnitudes = 0x7f;

  template <class Float>
  static FUSEDOPT_HD Float places(Float values, float units) {
    return magnitude(values * Float(units)) + Float(kFirstPlace);
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Float with_sign(Float values, Bits signs) {
    return as_float(as_bits(values) ^ (signs & 0x80000000u));
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Bits finished(Float values, Bits word) {
    return word | (as_bits(values) & 0x80000000u);
  }
};

struct PositiveCode {
  static constexpr int kLines = 3;
  static FUSEDOPT_HD constexpr Line line(int j) {
    return j == 0 ? Line{4, 0x5000} : j == 1 ? Line{3, 0x5100} : Line{2, 0x5200};
  }

  static constexpr bool kHasSign = false;
  static constexpr float kRange = 0x1p32f * (8062 - 0x1p-11f);
  static constexpr float kUnit = 1 / (0x1p32f * (8062 + 0x1p-10f));
  static constexpr uint32_t kMagnitudes = 0xff;

  template <class Float>
  static FUSEDOPT_HD Float places(Float values, float units) {
    return fma(values, Float(units), Float(kFirstPlace));
  }
  template <class Float, class Bits>
  static FUSEDOPT_HD Float with_sign(Float values, Bits) {
    return values;
  }
  // What is above 0 has bits that are, too, and stays so: at least code 1, in the upper byte. None
  // is below 0, nor -0.
  template <class Float, class Bits>
  static FUSEDOPT_HD Bits finished(Float values, Bits word) {
    return larger(word, smaller(as_bits(values) + 0x00ffffffu, Bits(0x01000000u)));
  }
};

// The upper halves of the bits of the places of codes, without their signs. They fit words of 16
// bits.
template <class Code, class Bits>
FUSEDOPT_HD Bits upper_halves_of_places(const Bits& codes) {
  Bits found = (codes << Code::line(0).shift) + Bits(Code::line(0).offset);
  for (int j = 1; j < Code::kLines; ++j)
    found = smaller(found, (codes << Code::line(j).shift) + Bits(Code::line(j).offset));
  return found;
}

// The values at places. Of `signs` the upper bits count, if codes have signs.
template <class Code, class Float, class Bits>
FUSEDOPT_HD Float values_at(const Float& places, const Bits& signs, float scale) {
  const float unit = scale * Code::kUnit;
  return Code::with_sign(fma(places, Float(unit), Float(-kFirstPlace * unit)), signs);
}

// The values of codes, each the lowest byte of a word with zeros above.
template <class Code, class Float, class Bits>
FUSEDOPT_HD Float decoded(const Bits& codes, float scale) {
  const Bits places = upper_halves_of_places<Code, Bits>(codes & Code::kMagnitudes) << 16;
  return values_at<Code>(as_float(places), codes << 24, scale);
}

// The units of a scale that is positive and finite, for encoded(). Both numbers are divided by 16,
// so that the reciprocal of no scale is subnormal. `math` divides as IEEE 754 demands.
template <class Code, class Math>
FUSEDOPT_HD float units_in(float scale, Math& math) {
  return math.quotient(Code::kRange * 0x1p-4f, scale * 0x1p-4f);
}

// What is added to a code before it is cut is one half, or drawn from all numbers of 24 bits: so
// many of these are one code.
inline constexpr uint32_t kHalf = 1u << 23;

// The codes of values, each in the upper byte of a word; what the other bytes have does not count.
// No magnitude is above the scale that has these units. Where a scale is 0 or NaN, all codes are 0,
// which is left to the caller.
template <class Code, class Float, class Bits>
FUSEDOPT_HD Bits encoded(const Float& values, float units, const Bits& fractions) {
  const Bits places = as_bits(Code::places(values, units));
  // Each line solved for the code, and multiplied by what makes the first of them the place itself:
  // 2^(16 + kFirst.shift) of these are one code. All are higher by the bits of the first place,
  // 5 * 2^28, so that none is below 0; the shift that takes codes to the upper byte drops that.
  constexpr Line kFirst = Code::line(0);
  Bits lines = places;
  for (int j = 1; j < Code::kLines; ++j) {
    const int shift = kFirst.shift - Code::line(j).shift;
    const uint32_t offset = (kFirst.offset << 16) - (Code::line(j).offset << (16 + shift));
    lines = larger(lines, (places << shift) + offset);
  }
  return Code::finished(values, (lines << (8 - kFirst.shift)) + fractions);
}

}  // namespace fusedopt
