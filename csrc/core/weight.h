// Master weights: weights kept in float32, or in 24 bits of it, although the param is narrower, so
// that small updates are not lost.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// Where the whole weight is.
enum class Master : uint8_t {
  kNone,     // the param is the weight
  kFloat32,  // a float32 operand is the weight, and the param is that, rounded
  kSplit,    // a bfloat16 param and a remainder of 16 bits are the weight together
  kSplit8,   // the same with a remainder of 8 bits, for a weight of 24
};

FUSEDOPT_HD Master master_of(DType dtype) {
  return dtype == DType::kAbsent       ? Master::kNone
         : dtype == DType::kRemainder  ? Master::kSplit
         : dtype == DType::kRemainder8 ? Master::kSplit8
                                       : Master::kFloat32;
}

FUSEDOPT_HD DType dtype_of(Master master) {
  return master == Master::kNone     ? DType::kAbsent
         : master == Master::kSplit  ? DType::kRemainder
         : master == Master::kSplit8 ? DType::kRemainder8
                                     : DType::kFloat32;
}

// Whether the weight is in two parts: the param, and its remainder.
FUSEDOPT_HD bool is_split(Master master) {
  return master == Master::kSplit || master == Master::kSplit8;
}

// A float in two parts: the nearest bfloat16, and the difference of the bits, between -0x8000 and
// 0x7fff. This is exact for all numbers and infinities. Ties go away from zero: with ties to even,
// some bfloat16 would be the nearest of 65537 floats, one more than 16 bits can tell apart. NaNs
// stay NaNs, in the param alone and joined.
template <class Float>
struct SplitWeight {
  using Bits = typename Lanes<Float>::Bits;
  Float param;     // a bfloat16, in the upper half
  Bits remainder;  // in the lower half of each word; the upper one may have any bits
};

// `kAreOrdinary` says that no weight is NaN, or so large that rounding could make it infinite. Then
// nothing is cleared that is not part of a result: the lower half of the param.
template <bool kAreOrdinary = false, class Float>
FUSEDOPT_HD SplitWeight<Float> split_weight(Float weight) {
  using Bits = typename Lanes<Float>::Bits;
  const Bits bits = as_bits(weight);
  if constexpr (kAreOrdinary) return {as_float(bits + 0x8000u), bits};
  const Bits nearest = (bits + 0x8000u) & 0xffff0000u;
  const Bits nan = (bits & 0xffff0000u) | 0x400000u;  // quiet, whatever the lower half
  const auto is_nan = weight != weight;
  return {as_float(select(is_nan, nan, nearest)), select(is_nan, Bits(0u), bits - nearest)};
}

// The weight again. No number is split so that the sum of the bits is NaN. But somebody may have
// written another number to the param, beside a remainder of before: then an infinity is itself,
// and so is a 0, which a negative remainder would otherwise take to the NaNs. Others are near to
// what was written.
template <class Float, class Bits>
FUSEDOPT_HD Float with_remainder(Float param, Bits remainder) {
  const Float joined = as_float(as_bits(param) + remainder);
  return select(joined == joined, joined, param);
}

// The upper halves of the words of `remainder` are ignored.
template <class Float, class Bits>
FUSEDOPT_HD Float join_weight(Float param, Bits remainder) {
  const Bits from_least = (remainder & 0xffffu) ^ 0x8000u;  // 0 for -0x8000
  return with_remainder(param, from_least - Bits(0x8000u));
}

// The same with the upper byte of a remainder whose lower one is 0: a signed number, times 256.
template <class Float, class Bits>
FUSEDOPT_HD Float join_weight8(Float param, Bits signed_byte) {
  return with_remainder(param, signed_byte);
}

// A weight of 24 bits, the upper ones of a float, is a weight whose remainder has a lower byte of
// 0: the upper one is kept. The 8 bits that are lost are rounded to nearest, with ties to even, or
// with 8 random bits up or down (core/stochastic.h); either way a finite number never becomes
// infinite. `weight` must be a result of arithmetic, as for round_stochastically(). With
// `kAreOrdinary`, the lower byte is not cleared: it has no part in what split_weight() makes of the
// other three.
template <bool kAreOrdinary = false, class Float, class Bits>
FUSEDOPT_HD Float round_to_24_bits(Float weight, Bits addend) {
  const Bits bits = as_bits(weight), moved = bits + addend;
  if constexpr (kAreOrdinary) return as_float(moved);
  // From the largest finite one of 24 bits on.
  const auto stays = (bits & 0x7fffffffu) > Bits(0x7f7fff00u);
  return as_float(select(stays, bits, moved) & 0xffffff00u);
}

template <class Float>
FUSEDOPT_HD Float nearest_of_24_bits(Float weight) {
  return round_to_24_bits(weight, ((as_bits(weight) >> 8) & 1u) + 0x7fu);
}

}  // namespace fusedopt
