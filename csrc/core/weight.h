// Master weights: weights kept in float32 although the param is narrower, so that small updates are
// not lost.
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
};

FUSEDOPT_HD Master master_of(DType dtype) {
  return dtype == DType::kAbsent      ? Master::kNone
         : dtype == DType::kRemainder ? Master::kSplit
                                      : Master::kFloat32;
}

// A float in two parts: the nearest bfloat16, and the difference of the bits, between -0x8000 and
// 0x7fff. This is exact for all numbers and infinities. Ties go away from zero: with ties to even,
// some bfloat16 would be the nearest of 65537 floats, one more than 16 bits can tell apart. NaNs
// stay NaNs, in the param alone and joined.
template <class Float>
struct SplitWeight {
  using Bits = typename Lanes<Float>::Bits;
  Float param;     // a bfloat16
  Bits remainder;  // in the lower half of each word
};

template <class Float>
FUSEDOPT_HD SplitWeight<Float> split_weight(Float weight) {
  using Bits = typename Lanes<Float>::Bits;
  const Bits bits = as_bits(weight);
  const Bits nearest = (bits + 0x8000u) & 0xffff0000u;
  const Bits nan = (bits & 0xffff0000u) | 0x400000u;  // quiet, whatever the lower half
  const auto is_nan = weight != weight;
  return {as_float(select(is_nan, nan, nearest)), select(is_nan, Bits(0u), bits - nearest)};
}

// The weight again. The upper halves of the words of `remainder` are ignored.
template <class Float, class Bits>
FUSEDOPT_HD Float join_weight(Float param, Bits remainder) {
  const Bits from_least = (remainder & 0xffffu) ^ 0x8000u;  // 0 for -0x8000
  return as_float(as_bits(param) + from_least - 0x8000u);
}

}  // namespace fusedopt
