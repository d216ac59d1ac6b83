#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

// Conversions between float and the bits of 16-bit formats, to nearest with ties to even. GPUs have
// instructions for them, which give the same numbers; a NaN stays a NaN, its payload is not kept.
namespace fusedopt {

// Exact for every half, subnormals included, and without ever forming a float subnormal, so that
// flush-to-zero modes do not matter. Selections instead of branches: the loop stays vectorised.
FUSEDOPT_HD float float_from_half(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
  return result;
#else
  constexpr uint32_t kExponent = 0x7c00u << 13;
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & kExponent;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);  // inf and NaN keep their payload
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t finite = exponent == 0 ? bit_cast<uint32_t>(subnormal) : normal;
  const uint32_t result = exponent == kExponent ? special : finite;
  return bit_cast<float>(result | (static_cast<uint32_t>(half & 0x8000u) << 16));
#endif
}

FUSEDOPT_HD uint16_t half_from_float(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  constexpr uint32_t kMagic = 126u << 23;  // 0.5f: its last bit weighs 2^-24, half's smallest
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(kMagic)) - kMagic;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t overflow = magnitude > 0x7f800000u ? nan : 0x7c00u;
  const uint32_t result = magnitude >= 0x477ff000u ? overflow : finite;  // 65520 and above
  return static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
#endif
}

FUSEDOPT_HD uint16_t bfloat16_from_float(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t nan = bits | 0x400000u;  // quiet, and never rounded up to infinity
  return static_cast<uint16_t>((value != value ? nan : rounded) >> 16);
#endif
}

}  // namespace fusedopt
