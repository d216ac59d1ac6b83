// Storage formats, and the conversions between them and the type that computes. Arithmetic is done
// in float, or in double where a float64 tensor takes part; narrower formats exist in memory only.
#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/macros.h"
#include "core/narrow.h"

namespace fusedopt {

// A bit for each format, so that a GPU tests for one in one instruction; testing the lowest bit
// takes two, so it is that of a rare one.
enum class DType : uint8_t {
  kAbsent = 0,         // there is no such operand
  kPositiveCodes = 1,  // 8 bits for what is never negative (core/codes.h)
  kFloat32 = 2,
  kFloat64 = 4,
  kBFloat16 = 8,
  kFloat16 = 16,
  kRemainder = 32,   // what a bfloat16 param lacks of its weight (core/weight.h)
  kRemainder8 = 64,  // the upper byte of that
  kSignedCodes = 128,
};

// Whether `dtype` is `other`, which must not be kAbsent.
FUSEDOPT_HD constexpr bool is(DType dtype, DType other) {
  return (static_cast<unsigned>(dtype) & static_cast<unsigned>(other)) != 0;
}

// Whether it stands for codes, which mean something together with the scale of their group.
FUSEDOPT_HD constexpr bool is_code(DType dtype) {
  return is(dtype, DType::kSignedCodes) || is(dtype, DType::kPositiveCodes);
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type that computes with values stored as `Storage`.
template <class Storage>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

// Bytes of an element; 0 for an operand that is absent.
FUSEDOPT_HD constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64                          ? 8
         : dtype == DType::kFloat32                        ? 4
         : dtype == DType::kAbsent                         ? 0
         : is(dtype, DType::kRemainder8) || is_code(dtype) ? 1
                                                           : 2;
}

// Calls `f` with a value of the storage type that `dtype` names, for the formats that T computes
// with: all but float64 for float, and all four for double.
template <class T, class F>
FUSEDOPT_HD void with_storage(DType dtype, F&& f) {
  if (is(dtype, DType::kFloat32)) return f(float{});
  if (is(dtype, DType::kBFloat16)) return f(BFloat16{});
  if constexpr (sizeof(T) == sizeof(double)) {
    if (is(dtype, DType::kFloat64)) return f(double{});
  }
  f(Float16{});
}

// Converts a stored number to T; store() rounds back to the nearest, with ties to even.
template <class T>
FUSEDOPT_HD T load(float from) {
  return static_cast<T>(from);
}
template <class T>
FUSEDOPT_HD T load(double from) {
  return static_cast<T>(from);
}
template <class T>
FUSEDOPT_HD T load(BFloat16 from) {
  return static_cast<T>(float_from_bfloat16(from.bits));
}
template <class T>
FUSEDOPT_HD T load(Float16 from) {
  return static_cast<T>(float_from_half(from.bits));
}

template <class T>
FUSEDOPT_HD void store(float& to, T value) {
  to = static_cast<float>(value);
}
template <class T>
FUSEDOPT_HD void store(double& to, T value) {
  to = static_cast<double>(value);
}
template <class T>
FUSEDOPT_HD void store(BFloat16& to, T value) {
  to.bits = bfloat16_from_float(static_cast<float>(value));
}
template <class T>
FUSEDOPT_HD void store(Float16& to, T value) {
  to.bits = half_from_float(static_cast<float>(value));
}

}  // namespace fusedopt
