#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

// Storage formats and their rounding. Arithmetic is done in float (in double when a float64 tensor
// takes part); narrower formats exist in memory only.
namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr int kNumDTypes = 4;

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Type used to compute with values stored as `Storage`.
template <class Storage>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Calls `f` with a value of the storage type that `dtype` names.
template <class F>
FUSEDOPT_HD void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

template <class To, class From>
FUSEDOPT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of equal size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FUSEDOPT_HD float to_float(float value) { return value; }

FUSEDOPT_HD float to_float(double value) { return static_cast<float>(value); }

FUSEDOPT_HD float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// Exact for every half, subnormals included, and without ever forming a float subnormal, so that
// flush-to-zero modes do not matter. Selections instead of branches: the loop stays vectorised.
FUSEDOPT_HD float to_float(Float16 value) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & kExponent;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);  // inf and NaN keep their payload
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t finite = exponent == 0 ? bit_cast<uint32_t>(subnormal) : normal;
  const uint32_t result = exponent == kExponent ? special : finite;
  return bit_cast<float>(result | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
}

// Converts a computed value to a storage format, to nearest with ties to even.
template <class Storage, class T>
struct Rounding {
  static FUSEDOPT_HD Storage apply(T value) { return static_cast<Storage>(value); }
};

template <class T>
struct Rounding<BFloat16, T> {
  static FUSEDOPT_HD BFloat16 apply(T value) {
    const float narrow = static_cast<float>(value);
    const uint32_t bits = bit_cast<uint32_t>(narrow);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t nan = bits | 0x400000u;  // quiet, and never rounded up to infinity
    return {static_cast<uint16_t>((narrow != narrow ? nan : rounded) >> 16)};
  }
};

template <class T>
struct Rounding<Float16, T> {
  static FUSEDOPT_HD Float16 apply(T value) {
    constexpr uint32_t kMagic = 126u << 23;  // 0.5f: its last bit weighs 2^-24, half's smallest
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal =
        bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(kMagic)) - kMagic;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    const uint32_t overflow = magnitude > 0x7f800000u ? nan : 0x7c00u;
    const uint32_t result = magnitude >= 0x477ff000u ? overflow : finite;  // 65520 and above
    return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
  }
};

template <class T, class Storage>
FUSEDOPT_HD T load(const Storage& from) {
  return static_cast<T>(to_float(from));
}

template <>
FUSEDOPT_HD double load<double, double>(const double& from) {
  return from;
}

template <class Storage, class T>
FUSEDOPT_HD void store(Storage& to, T value) {
  to = Rounding<Storage, T>::apply(value);
}

}  // namespace fusedopt
