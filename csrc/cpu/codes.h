// States in 8 bits on the CPU: a group's new values are kept until all are known, and then encoded.
// Part of isa_kernels.h, which says what must not be used here.
#pragma once

#include "core/codes.h"
#include "core/element.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// The new values of a state in a group, and what is added to the code of each before it is cut.
struct CodeGroup {
  alignas(64) float values[kGroup];
  alignas(64) uint32_t fractions[kGroup];
};

// Two registers of values from their codes. Places fit 16 bits, so twice as many as there are
// floats in a register are found at a time.
template <class Code, int kLanes>
FUSEDOPT_HD void read_codes(const void* from, float scale, Vec<float, kLanes> (&to)[2]) {
  using Halves = Vec<uint16_t, 2 * kLanes>;
  const Halves codes = read_bytes_as_halves<2 * kLanes>(from);
  Halves places =
      upper_halves_of_places(Code::kHasSign ? codes & Halves(Code::kMagnitudes) : codes);
  if constexpr (Code::kHasSign) places = places | ((codes << 8) & Halves(0x8000));
  Vec<uint32_t, kLanes> words[2];
  as_upper_halves(places, words);
  for (int j = 0; j < 2; ++j)
    to[j] = values_at<Code>(Code::kHasSign ? magnitude(as_float(words[j])) : as_float(words[j]),
                            words[j], scale);
}

// Finds the scale and the codes of a group, which may have fewer elements than a whole one: the
// values behind the last do not count. Not inlined, so that there is one copy for all rules.
template <class Code>
__attribute__((noinline)) void encode_group(CodeGroup& group, float* scale_at, uint8_t* codes,
                                            int64_t count) {
  constexpr int kLanes = kRegisterBytes / 4;
  using Float = Vec<float, kLanes>;
  using Bits = Vec<uint32_t, kLanes>;
  for (int64_t i = count; i < kGroup; ++i) group.values[i] = 0;
  Bits largest(0u);
  for (int i = 0; i < kGroup; i += kLanes)
    largest = larger(largest, Bits(read<typename Bits::Raw>(group.values + i)) & 0x7fffffffu);
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = larger(most, uint32_t{largest.raw[i]});
  const float scale = scale_of(most);
  *scale_at = scale;
  if (!(scale > 0)) {  // all are 0, or one is not finite
    __builtin_memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  Ieee math;
  const float units = units_in<Code>(scale, math);
  alignas(64) uint8_t found[kGroup];
  uint8_t* const to = count < kGroup ? found : codes;
  for (int i = 0; i < kGroup; i += kLanes) {
    const Float values = read<typename Float::Raw>(group.values + i);
    const Bits fractions = read<typename Bits::Raw>(group.fractions + i);
    write_bytes(to + i, encoded<Code>(values, units, fractions) >> 24);
  }
  if (count < kGroup) __builtin_memcpy(codes, found, static_cast<size_t>(count));
}

}  // namespace
}  // namespace fusedopt::cpu
