// The values that the text of an element (core/element.h) computes with: packs of numbers here, or
// packs of vector registers on a CPU (cpu/vec.h). Both have the operators of numbers and the
// functions below, so the formulas are written once.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

namespace fusedopt {

// For a type of values, the types with as many floats and as many 32-bit words.
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

FUSEDOPT_HD uint32_t as_bits(float value) { return bit_cast<uint32_t>(value); }
FUSEDOPT_HD uint64_t as_bits(double value) { return bit_cast<uint64_t>(value); }
FUSEDOPT_HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
FUSEDOPT_HD uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
FUSEDOPT_HD uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
FUSEDOPT_HD float larger(float a, float b) { return a > b ? a : b; }
FUSEDOPT_HD float magnitude(float x) { return std::fabs(x); }
FUSEDOPT_HD float as_float(uint32_t bits) { return bit_cast<float>(bits); }

// Conversions between the type that computes and float.
FUSEDOPT_HD float to_float(float value) { return value; }
FUSEDOPT_HD float to_float(double value) { return static_cast<float>(value); }
template <class V>
FUSEDOPT_HD V from_float(float value) {
  return static_cast<V>(value);
}

// Several values side by side, each computed with like a single one.
template <class V, int kCount>
struct Pack {
  using Value = V;
  using Mask = Pack<decltype(V() < V()), kCount>;

  V values[kCount];

  Pack() = default;
  template <class T>
  FUSEDOPT_HD Pack(T value) {  // the same in all places
    for (V& own : values) own = V(value);
  }

  FUSEDOPT_HD V& operator[](int j) { return values[j]; }
  FUSEDOPT_HD const V& operator[](int j) const { return values[j]; }

  FUSEDOPT_HD friend Pack operator+(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] + b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator-(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] - b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator*(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] * b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator/(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] / b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator&(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] & b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator|(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] | b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator^(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] ^ b[j];
    return a;
  }
  FUSEDOPT_HD friend Pack operator<<(Pack a, int n) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] << n;
    return a;
  }
  FUSEDOPT_HD friend Pack operator>>(Pack a, int n) {
    for (int j = 0; j < kCount; ++j) a[j] = a[j] >> n;
    return a;
  }
  FUSEDOPT_HD friend Mask operator<(const Pack& a, const Pack& b) {
    Mask mask;
    for (int j = 0; j < kCount; ++j) mask[j] = a[j] < b[j];
    return mask;
  }
  FUSEDOPT_HD friend Mask operator>(const Pack& a, const Pack& b) {
    Mask mask;
    for (int j = 0; j < kCount; ++j) mask[j] = a[j] > b[j];
    return mask;
  }
  FUSEDOPT_HD friend Mask operator==(const Pack& a, const Pack& b) {
    Mask mask;
    for (int j = 0; j < kCount; ++j) mask[j] = a[j] == b[j];
    return mask;
  }
  FUSEDOPT_HD friend Mask operator!=(const Pack& a, const Pack& b) {
    Mask mask;
    for (int j = 0; j < kCount; ++j) mask[j] = a[j] != b[j];
    return mask;
  }

  FUSEDOPT_HD friend Pack fma(const Pack& a, const Pack& b, Pack c) {
    for (int j = 0; j < kCount; ++j) c[j] = fma(a[j], b[j], c[j]);
    return c;
  }
  FUSEDOPT_HD friend Pack larger(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = larger(a[j], b[j]);
    return a;
  }
  FUSEDOPT_HD friend Pack smaller(Pack a, const Pack& b) {
    for (int j = 0; j < kCount; ++j) a[j] = smaller(a[j], b[j]);
    return a;
  }
  FUSEDOPT_HD friend Pack square_root(Pack x) {
    for (int j = 0; j < kCount; ++j) x[j] = square_root(x[j]);
    return x;
  }
  FUSEDOPT_HD friend Pack magnitude(Pack x) {
    for (int j = 0; j < kCount; ++j) x[j] = magnitude(x[j]);
    return x;
  }
  FUSEDOPT_HD friend Pack select(const Mask& mask, Pack then, const Pack& otherwise) {
    for (int j = 0; j < kCount; ++j) then[j] = select(mask[j], then[j], otherwise[j]);
    return then;
  }
};

template <class V, int kCount>
struct Lanes<Pack<V, kCount>> {
  using Float = Pack<typename Lanes<V>::Float, kCount>;
  using Bits = Pack<typename Lanes<V>::Bits, kCount>;
};

template <class Float, int kCount>
FUSEDOPT_HD auto as_bits(const Pack<Float, kCount>& from) {
  Pack<typename Lanes<Float>::Bits, kCount> to;
  for (int j = 0; j < kCount; ++j) to[j] = as_bits(from[j]);
  return to;
}
template <class Bits, int kCount>
FUSEDOPT_HD auto as_float(const Pack<Bits, kCount>& from) {
  Pack<decltype(as_float(from[0])), kCount> to;
  for (int j = 0; j < kCount; ++j) to[j] = as_float(from[j]);
  return to;
}
template <class V, int kCount>
FUSEDOPT_HD auto to_float(const Pack<V, kCount>& from) {
  Pack<typename Lanes<V>::Float, kCount> to;
  for (int j = 0; j < kCount; ++j) to[j] = to_float(from[j]);
  return to;
}
template <class P, class Float, int kCount>
FUSEDOPT_HD P from_float(const Pack<Float, kCount>& from) {
  P to;
  for (int j = 0; j < kCount; ++j) to[j] = from_float<typename P::Value>(from[j]);
  return to;
}

// The same as ?:, which for packs chooses between addresses: the compiler would then keep both
// packs in memory and not in registers.
template <class V>
FUSEDOPT_HD V either(bool condition, V then, V otherwise) {
  return condition ? then : otherwise;
}
template <class V, int kCount>
FUSEDOPT_HD Pack<V, kCount> either(bool condition, Pack<V, kCount> then,
                                   const Pack<V, kCount>& otherwise) {
  for (int j = 0; j < kCount; ++j) then[j] = either(condition, then[j], otherwise[j]);
  return then;
}

// std::integral_constant, whose conversion cannot be called in device code.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  FUSEDOPT_HD constexpr operator int() const { return kValue; }
};

// Calls f(0), ... f(kCount - 1) with constants. Arrays that are indexed by constants alone can be
// kept in registers.
template <int kCount, int kFirst = 0, class F>
FUSEDOPT_HD void unroll(const F& f) {
  if constexpr (kFirst < kCount) {
    f(Constant<kFirst>{});
    unroll<kCount, kFirst + 1>(f);
  }
}

}  // namespace fusedopt
