// States in 8 bits on the CPU: the new values of some groups are kept, and then encoded together.
// Part of isa_kernels.h, which says what must not be used here.
#pragma once

#include "core/codes.h"
#include "core/element.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// Elements whose codes are made at once: several groups, since one has to wait for its scale, and
// few enough that all of it stays in the first cache.
constexpr int64_t kEncodedAtOnce = 4 * kGroup;

// The new values of a state, and what is added to the code of each before it is cut. An element has
// the place of its number, modulo how many there are.
struct NewValues {
  alignas(64) float values[kEncodedAtOnce];
  alignas(64) uint32_t fractions[kEncodedAtOnce];
};

// Two registers of values from their codes. Places fit 16 bits, so twice as many as there are
// floats in a register are found at a time.
template <class Code, int kLanes>
FUSEDOPT_HD void read_codes(const void* from, float scale, Vec<float, kLanes> (&to)[2]) {
  using Halves = Vec<uint16_t, 2 * kLanes>;
  const Halves codes = read_bytes_as_halves<2 * kLanes>(from);
  Halves places =
      upper_halves_of_places<Code>(Code::kHasSign ? codes & Halves(Code::kMagnitudes) : codes);
  if constexpr (Code::kHasSign) places = places | ((codes << 8) & Halves(0x8000));
  Vec<uint32_t, kLanes> words[2];
  as_upper_halves(places, words);
  for (int j = 0; j < 2; ++j)
    to[j] = values_at<Code>(Code::kHasSign ? magnitude(as_float(words[j])) : as_float(words[j]),
                            words[j], scale);
}

// The bits of the largest magnitude of a group, of which `count` elements count.
inline uint32_t largest_magnitude(float* values, int64_t count) {
  constexpr int kLanes = kRegisterBytes / 4;
  using Bits = Vec<uint32_t, kLanes>;
  for (int64_t i = count; i < kGroup; ++i) values[i] = 0;
  Bits largest(0u);
  for (int i = 0; i < kGroup; i += kLanes)
    largest = larger(largest, Bits(read<typename Bits::Raw>(values + i)) & 0x7fffffffu);
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = larger(most, uint32_t{largest.raw[i]});
  return most;
}

// The codes of a whole group.
template <class Code>
void encode_group(const float* values, const uint32_t* fractions, float scale, float units,
                  char* codes) {
  constexpr int kLanes = kRegisterBytes / 4;
  using Float = Vec<float, kLanes>;
  using Bits = Vec<uint32_t, kLanes>;
  if (!(scale > 0)) {  // all are 0, or one is not finite
    __builtin_memset(codes, 0, kGroup);
    return;
  }
  Bits words[kGroup / kLanes];
  for (int i = 0; i < kGroup / kLanes; ++i)
    words[i] = encoded<Code>(Float(read<typename Float::Raw>(values + i * kLanes)), units,
                             Bits(read<typename Bits::Raw>(fractions + i * kLanes)));
  write_upper_bytes(codes, words);
}

// Finds the scales and the codes of elements [begin, end), where `begin` is the first of a group
// and the last group may be a part of one. All have places in `from`. Not inlined, so that there is
// one copy for all rules.
template <class Code>
__attribute__((noinline)) void encode(NewValues& from, int64_t begin, int64_t end, float* scales,
                                      char* codes) {
  float units[kEncodedAtOnce / kGroup];
  Ieee math;
  for (int64_t at = begin; at < end; at += kGroup) {
    const int64_t place = at % kEncodedAtOnce, count = end - at < kGroup ? end - at : kGroup;
    const float scale = scale_of(largest_magnitude(from.values + place, count));
    scales[at / kGroup] = scale;
    units[place / kGroup] = units_in<Code>(scale, math);
  }
  for (int64_t at = begin; at < end; at += kGroup) {
    const int64_t place = at % kEncodedAtOnce;
    const bool is_whole = end - at >= kGroup;
    char found[kGroup];
    encode_group<Code>(from.values + place, from.fractions + place, scales[at / kGroup],
                       units[place / kGroup], is_whole ? codes + at : found);
    if (!is_whole) __builtin_memcpy(codes + at, found, static_cast<size_t>(end - at));
  }
}

}  // namespace
}  // namespace fusedopt::cpu
