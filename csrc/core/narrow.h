// Conversions between float and the bits of 16-bit formats, which are in the lower half of a word;
// and the third byte of a word, for which GPUs have an instruction, too. Conversions round to
// nearest with ties to even. GPUs and some CPUs have instructions for them, which give the same
// numbers; a NaN stays a NaN, but its payload is not kept. They do not depend on whether subnormals
// are flushed, except for subnormal floats, which may count as zero.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace fusedopt {

FUSEDOPT_HD float float_from_bfloat16(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

// The first or the second of the two bfloat16 numbers in a word: each is the upper half of a float.
FUSEDOPT_HD float float_from_pair(uint32_t pair, bool is_second) {
  return as_float(is_second ? pair & 0xffff0000u : pair << 16);
}

// Exact for every half, subnormal ones included, and without a subnormal float on the way, as that
// could be flushed. `half` is a word, or several.
template <class Bits>
FUSEDOPT_HD auto float_from_half_bits(Bits half) {
  const Bits exponents = 0x7c00u << 13, smallest = 113u << 23;
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits exponent = magnitude & exponents;
  const Bits normal = magnitude + (112u << 23);
  const Bits special = magnitude + (224u << 23);  // inf and NaN keep their payload
  const auto subnormal = as_float(magnitude + smallest) - as_float(smallest);
  const Bits finite = select(exponent == Bits(0u), as_bits(subnormal), normal);
  return as_float(select(exponent == exponents, special, finite) | ((half & 0x8000u) << 16));
}

FUSEDOPT_HD float float_from_half(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
  return result;
#else
  return float_from_half_bits(uint32_t{half});
#endif
}

// Normal halves are rounded as integers: half a last place is added, less a little if the last bit
// is even. Subnormal ones are rounded by adding 0.5f, whose last bit weighs as much as theirs.
template <class Float>
FUSEDOPT_HD auto half_bits_from_float(Float value) {
  using Bits = typename Lanes<Float>::Bits;
  const Bits magic = 126u << 23;  // 0.5f: its last bit weighs 2^-24, half's smallest
  const Bits bits = as_bits(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = as_bits(as_float(magnitude) + as_float(magic)) - magic;
  const Bits finite = select(magnitude < Bits(113u << 23), subnormal, normal);
  const Bits nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  const Bits overflow = select(magnitude > Bits(0x7f800000u), nan, Bits(0x7c00u));
  const Bits rounded = select(magnitude < Bits(0x477ff000u), finite, overflow);  // below 65520
  return rounded | ((bits >> 16) & 0x8000u);
}

FUSEDOPT_HD uint16_t half_from_float(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  return static_cast<uint16_t>(half_bits_from_float(value));
#endif
}

// The bfloat16 is the upper half of the resulting word. The lower half is left over from rounding
// and has no meaning.
template <class Float>
FUSEDOPT_HD auto rounded_to_bfloat16(Float value) {
  const auto bits = as_bits(value);
  const auto nan = bits | 0x400000u;  // quiet, and never rounded up to infinity
  return select(value != value, nan, bits + 0x7fffu + ((bits >> 16) & 1u));
}

FUSEDOPT_HD uint16_t bfloat16_from_float(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#else
  return static_cast<uint16_t>(rounded_to_bfloat16(value) >> 16);
#endif
}

// The third byte of a word, counted from the lowest.
template <class Bits>
FUSEDOPT_HD Bits third_byte(Bits word) {
  return (word >> 16) & 0xffu;
}
FUSEDOPT_HD uint32_t third_byte(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4442);
#else
  return word >> 16 & 0xffu;
#endif
}
template <class Bits, int kCount>
FUSEDOPT_HD Pack<Bits, kCount> third_byte(Pack<Bits, kCount> words) {
  for (int j = 0; j < kCount; ++j) words[j] = third_byte(words[j]);
  return words;
}

}  // namespace fusedopt
