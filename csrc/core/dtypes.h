#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"
#include "core/narrow.h"

// Storage formats and their rounding. Arithmetic is done in float (in double when a float64 tensor
// takes part); narrower formats exist in memory only.
namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kRemainder };
inline constexpr int kNumDTypes =
    4;  // that hold numbers; a remainder means something beside a param

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

FUSEDOPT_HD constexpr int64_t item_size(DType dtype) {
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
    case DType::kRemainder:
      break;
  }
}

FUSEDOPT_HD float to_float(float value) { return value; }

FUSEDOPT_HD float to_float(double value) { return static_cast<float>(value); }

FUSEDOPT_HD float to_float(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

FUSEDOPT_HD float to_float(Float16 value) { return float_from_half(value.bits); }

// Converts a computed value to a storage format, to nearest with ties to even.
template <class Storage, class T>
struct Rounding {
  static FUSEDOPT_HD Storage apply(T value) { return static_cast<Storage>(value); }
};

template <class T>
struct Rounding<BFloat16, T> {
  static FUSEDOPT_HD BFloat16 apply(T value) {
    return {bfloat16_from_float(static_cast<float>(value))};
  }
};

template <class T>
struct Rounding<Float16, T> {
  static FUSEDOPT_HD Float16 apply(T value) { return {half_from_float(static_cast<float>(value))}; }
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
