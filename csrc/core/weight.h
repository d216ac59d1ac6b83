#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

// Weights kept in float32 although the param is narrower, so that small updates are not lost.
namespace fusedopt {

// Where the rest of a weight is.
enum class Master : uint8_t {
  kNone,     // the param is the weight
  kFloat32,  // an operand in float32 is; the param is that, rounded
  kSplit,    // a bfloat16 param and a remainder of 16 bits are, together
};

// A float in two parts: the nearest bfloat16, and what its bits lack, between -0x8000 and 0x7fff.
// Exact for all numbers and infinities. Ties go away from zero: to even, one bfloat16 would have to
// be the param of 65537 floats. NaNs stay NaNs, in the param alone and joined.
struct SplitWeight {
  uint16_t param;
  int16_t remainder;
};

FUSEDOPT_HD SplitWeight split_weight(float weight) {
  const uint32_t bits = bit_cast<uint32_t>(weight);
  const uint32_t nearest = (bits + 0x8000u) & 0xffff0000u;
  const uint32_t nan = (bits & 0xffff0000u) | 0x400000u;  // quiet, whatever the lower half
  const bool is_nan = weight != weight;
  return {static_cast<uint16_t>((is_nan ? nan : nearest) >> 16),
          static_cast<int16_t>(is_nan ? 0u : bits - nearest)};
}

FUSEDOPT_HD float join_weight(SplitWeight parts) {
  const auto remainder = static_cast<uint32_t>(static_cast<int32_t>(parts.remainder));
  return bit_cast<float>((static_cast<uint32_t>(parts.param) << 16) + remainder);
}

}  // namespace fusedopt
