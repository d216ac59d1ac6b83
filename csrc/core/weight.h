#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/lanes.h"
#include "core/macros.h"

// Weights kept in float32 although the param is narrower, so that small updates are not lost.
namespace fusedopt {

// Where the rest of a weight is.
enum class Master : uint8_t {
  kNone,     // the param is the weight
  kFloat32,  // an operand in float32 is; the param is that, rounded
  kSplit,    // a bfloat16 param and a remainder of 16 bits are, together
};

FUSEDOPT_HD Master master_of(DType dtype) {
  return dtype == DType::kAbsent      ? Master::kNone
         : dtype == DType::kRemainder ? Master::kSplit
                                      : Master::kFloat32;
}

// A float in two parts: the nearest bfloat16, and what its bits lack, between -0x8000 and 0x7fff.
// Exact for all numbers and infinities. Ties go away from zero: to even, one bfloat16 would have to
// be the param of 65537 floats. NaNs stay NaNs, in the param alone and joined.
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

// The upper halves of the remainder's words do not count.
template <class Float, class Bits>
FUSEDOPT_HD Float join_weight(Float param, Bits remainder) {
  const Bits from_least = (remainder & 0xffffu) ^ 0x8000u;  // 0 for -0x8000
  return as_float(as_bits(param) + from_least - 0x8000u);
}

}  // namespace fusedopt
