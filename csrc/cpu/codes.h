// States in 8 bits on the CPU: a group's new values are kept until all are known, and then encoded.
// Part of isa_kernels.h, which says what must not be used here.
#pragma once

#include "core/codes.h"
#include "core/element.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// The new values of a state in a group, and for each where its threshold lies (core/codes.h).
struct CodeGroup {
  alignas(64) float values[kGroup];
  alignas(64) float shares[kGroup];
};

// What core/codes.h asks for: reciprocals, and roots of numbers that are not negative, about.
struct Approximate {
  template <int kLanes>
  FUSEDOPT_HD Vec<float, kLanes> about_root(Vec<float, kLanes> x) const {
    if constexpr (!kHasReciprocalRoot<kLanes>) return square_root(x);
    return x * reciprocal_root(x + Vec<float, kLanes>(0x1p-126f));  // never 0 times infinity
  }
  template <int kLanes>
  FUSEDOPT_HD Vec<float, kLanes> about_fourth_root(Vec<float, kLanes> x) const {
    return kHasReciprocalRoot<kLanes> ? reciprocal_root(reciprocal_root(x))
                                      : square_root(square_root(x));
  }
  FUSEDOPT_HD float about_reciprocal(float x) const { return 1 / x; }

 private:
#if defined(__AVX512F__)
  template <int kLanes>
  static constexpr bool kHasReciprocalRoot = kLanes == 16;
#elif defined(__AVX2__)
  template <int kLanes>
  static constexpr bool kHasReciprocalRoot = kLanes == 8;
#else
  template <int kLanes>
  static constexpr bool kHasReciprocalRoot = false;
#endif

  template <int kLanes>
  static FUSEDOPT_HD Vec<float, kLanes> reciprocal_root(Vec<float, kLanes> x) {
#if defined(__AVX512F__)
    if constexpr (kHasReciprocalRoot<kLanes>)
      x = typename RawVec<float, kLanes>::Type(_mm512_maskz_rsqrt14_ps(0xffff, __m512(x.raw)));
#elif defined(__AVX2__)
    if constexpr (kHasReciprocalRoot<kLanes>)
      x = typename RawVec<float, kLanes>::Type(_mm256_rsqrt_ps(__m256(x.raw)));
#endif
    return x;
  }
};

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
  Approximate math;
  alignas(64) uint8_t found[kGroup];
  uint8_t* const to = count < kGroup ? found : codes;
  for (int i = 0; i < kGroup; i += kLanes) {
    const Float values = read<typename Float::Raw>(group.values + i);
    const Float shares = read<typename Float::Raw>(group.shares + i);
    write_bytes(to + i, encoded<Code>(values, scale, shares, math));
  }
  if (count < kGroup) __builtin_memcpy(codes, found, static_cast<size_t>(count));
}

}  // namespace
}  // namespace fusedopt::cpu
