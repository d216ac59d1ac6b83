#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

// What the text of an element computes with: single numbers on a GPU, as many as a register holds
// on a CPU (cpu/vec.h). Both have the operators of numbers and the functions below.
namespace fusedopt {

// For a type of values: the types of as many floats and 32-bit words.
template <class V>
struct Lanes;
template <>
struct Lanes<float> {
  using Float = float;
  using Bits = uint32_t;
};
template <>
struct Lanes<double> {
  using Float = float;
  using Bits = uint32_t;
};

FUSEDOPT_HD float fma(float a, float b, float c) { return std::fma(a, b, c); }
FUSEDOPT_HD double fma(double a, double b, double c) { return std::fma(a, b, c); }
FUSEDOPT_HD float square_root(float x) { return std::sqrt(x); }
FUSEDOPT_HD double square_root(double x) { return std::sqrt(x); }

template <class T>
FUSEDOPT_HD T select(bool condition, T then, T otherwise) {
  return condition ? then : otherwise;
}

// As ?: of values; of variables, it would want their addresses, and so keep them in memory.
template <class V>
FUSEDOPT_HD V either(bool condition, V then, V otherwise) {
  return condition ? then : otherwise;
}

FUSEDOPT_HD uint32_t as_bits(float value) { return bit_cast<uint32_t>(value); }
FUSEDOPT_HD float as_float(uint32_t bits) { return bit_cast<float>(bits); }

// Between the type that computes and float.
FUSEDOPT_HD float to_float(float value) { return value; }
FUSEDOPT_HD float to_float(double value) { return static_cast<float>(value); }
template <class V>
FUSEDOPT_HD V from_float(float value) {
  return static_cast<V>(value);
}

// std::integral_constant, which the device lacks.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  FUSEDOPT_HD constexpr operator int() const { return kValue; }
};

// Calls f(0), ... f(kCount - 1) with constants, so that arrays indexed by them are in registers.
template <int kCount, int kFirst = 0, class F>
FUSEDOPT_HD void unroll(const F& f) {
  if constexpr (kFirst < kCount) {
    f(Constant<kFirst>{});
    unroll<kCount, kFirst + 1>(f);
  }
}

}  // namespace fusedopt
