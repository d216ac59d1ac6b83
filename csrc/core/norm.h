// The global norm of the grads. Its bits depend on the grads alone: not on their order, nor on how
// they are divided among registers, threads, devices and processes. Sums of floating-point numbers
// depend on their order; so the squares are cut into integers on a grid, and integers are summed:
// J. Demmel, H. D. Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers 64
// (2015); P. Ahrens, J. Demmel, H. D. Nguyen, "Algorithms for Efficient Reproducible Floating Point
// Summation", ACM TOMS 46 (2020).
//
// The grid has a bin for every 20 binary digits of squares: that of number b counts multiples of
// 2^(20 b). A square is rounded to a multiple of 2^(20 b), its slice for bin b; what is left is
// rounded to a multiple of 2^(20 (b-1)), and so on, always to the nearest. All of it is exact, and
// a slice is at most 2^19. To find the slices of bins b and below, the grad is multiplied by
// 2^(-10 b) before it is squared. That rounds nothing, the first slice is then in units of 1, and
// no square overflows; one that underflows has no slice that is not 0.
//
// A square's own bin is the highest one in which its slice is not 0, where it is above 0. Whoever
// sums finds slices for kSlices bins, from the highest own bin that it has met down; those above
// are all 0. The result has the kSlices bins from the highest one down whose sum is not 0. That is
// the highest own bin of all, so every square has been counted in each of these bins, and what is
// in lower ones is left out. Hence it makes no difference who has met what.
//
// What is left out of a square is at most 2^-60 of the largest one. So a sum of 2^36 squares is
// right to 2^-24, and of fewer or less uneven ones to the last digits of a double; bins have room
// for 2^44. Grads of at most 32 bits are squared in float, which rounds each square, and float64
// in double. Grads below 2^-120 in float, and below 2^-1020 in double, lose digits; subnormal
// floats are 0, as everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/bits.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

inline constexpr int kSlices = 4;
inline constexpr int kSliceBits = 20;
inline constexpr int kGradBits = kSliceBits / 2;  // a bin has this many binary digits of grads

// What the bits of a number mean.
template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Word = uint32_t;
  using Signed = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Word kRootOfTwo = 0x3504f3;  // mantissa of the largest x with x * x <= 2
  static constexpr int kMostSquares = 4095;     // whose slices a word has room for
};
template <>
struct FloatBits<double> {
  using Word = uint64_t;
  using Signed = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Word kRootOfTwo = 0x6a09e667f3bcc;
  static constexpr int kMostSquares = INT32_MAX;
};
template <class T>
using Word = typename FloatBits<T>::Word;

template <class T>
inline constexpr Word<T> kInfinityBits =
    Word<T>{2 * FloatBits<T>::kBias + 1} << FloatBits<T>::kMantissa;

// The highest own bin of a T; the lowest is -kTopBin.
template <class T>
inline constexpr int kTopBin = (FloatBits<T>::kBias - 1) / kGradBits;

// What is known of a set of grads: the sums of slices, and how many are infinite or NaN. Those of
// two sets are added, word by word, to those of both.
inline constexpr int kBins = 2 * kTopBin<double> + kSlices;
struct NormSums {
  int64_t bins[kBins];
  int64_t infinite;
  int64_t nan;

  NormSums& operator+=(const NormSums& other) {
    for (int i = 0; i < kBins; ++i) bins[i] += other.bins[i];
    infinite += other.infinite;
    nan += other.nan;
    return *this;
  }
};
inline constexpr int64_t kNormWords = sizeof(NormSums) / sizeof(int64_t);

// Where the sum of a bin is.
FUSEDOPT_HD constexpr int bin_index(int bin) { return bin + kTopBin<double> + kSlices - 1; }

template <class T>
FUSEDOPT_HD T power_of_two(int exponent) {
  using Bits = FloatBits<T>;
  return bit_cast<T>(static_cast<Word<T>>(exponent + Bits::kBias) << Bits::kMantissa);
}

// What a look at grads shows: the bits of the largest magnitude, and how many are not finite.
template <class T>
struct Magnitudes {
  Word<T> largest = 0;
  int32_t infinite = 0;
  int32_t nan = 0;

  FUSEDOPT_HD void add(T grad) {
    const Word<T> magnitude = as_bits(grad) << 1 >> 1;
    infinite += magnitude == kInfinityBits<T> ? 1 : 0;
    nan += magnitude > kInfinityBits<T> ? 1 : 0;
    largest = larger(largest, magnitude);
  }
  FUSEDOPT_HD bool are_finite() const { return infinite + nan == 0; }
};

// What the grads are multiplied by for slices from this bin down.
template <class T>
FUSEDOPT_HD T norm_scale(int bin) {
  return power_of_two<T>(-kGradBits * bin);
}

// Numbers near this one have the unit of slice number k as their last digit.
template <class T>
FUSEDOPT_HD constexpr Word<T> magic_bits(int k) {
  using Bits = FloatBits<T>;
  return (static_cast<Word<T>>(Bits::kBias + Bits::kMantissa - kSliceBits * k) << Bits::kMantissa) +
         (Word<T>{1} << (Bits::kMantissa - 1));
}

// The bits of the largest square that has no slice above the first.
template <class T>
inline constexpr Word<T> kLargestSquare =
    Word<T>{FloatBits<T>::kBias + kSliceBits - 1} << FloatBits<T>::kMantissa;

// The own bin of a square, by the bits of the grad's magnitude, which is finite.
template <class T>
FUSEDOPT_HD int own_bin(Word<T> magnitude) {
  using Bits = FloatBits<T>;
  constexpr Word<T> kBin = Word<T>{kGradBits} << Bits::kMantissa;
  constexpr Word<T> kLowest =  // the largest grad of the lowest bin
      (Word<T>{Bits::kBias + kGradBits - 1 - kGradBits * kTopBin<T>} << Bits::kMantissa) +
      Bits::kRootOfTwo;
  const Word<T> above = magnitude > kLowest ? magnitude - kLowest : 0;
  return static_cast<int>((above + kBin - 1) / kBin) - kTopBin<T>;
}

// The square of a grad, for add_slices().
template <class V>
FUSEDOPT_HD V scaled_square(V grad, V scale) {
  const V scaled = grad * scale;
  return scaled * scaled;
}

// Adds a square's slices, each in the place of its bits above those of a magic number: the sum has
// those once for each square. With kFirst, `square` is what the slices above have left of it.
template <class T, int kFirst = 0, class V, class Words>
FUSEDOPT_HD void add_slices(V square, Words (&sums)[kSlices]) {
  for (int k = kFirst; k < kSlices; ++k) {
    const V magic = bit_cast<T>(magic_bits<T>(k));
    const V rounded = square + magic;
    sums[k] = sums[k] + as_bits(rounded);
    square = square - (rounded - magic);
  }
}

// Whether the squares of what is stored so are exact in float: it has at most 11 digits.
template <class Storage>
inline constexpr bool kHasExactSquares = sizeof(Storage) == 2;

// As add_slices() of an exact square, in fewer operations: fma() squares for nothing. Returns the
// bits of the number that has the first slice, which are above kLargestFirst if the square is above
// kLargestSquare: none of 11 digits is within half a unit of that, which is not a square.
template <class T, class V, class Words>
FUSEDOPT_HD Words add_exact_slices(V scaled, Words (&sums)[kSlices]) {
  const V magic = bit_cast<T>(magic_bits<T>(0));
  const V rounded = fma(scaled, scaled, magic);
  sums[0] = sums[0] + as_bits(rounded);
  add_slices<T, 1>(fma(scaled, scaled, magic - rounded), sums);
  return as_bits(rounded);
}
template <class T>
inline constexpr Word<T> kLargestFirst = magic_bits<T>(0) + (Word<T>{1} << (kSliceBits - 1));

// What add_slices() has added of slice number k for `count` squares.
template <class T>
FUSEDOPT_HD int64_t slice_sum(Word<T> sum, int64_t count, int k) {
  return static_cast<typename FloatBits<T>::Signed>(sum -
                                                    static_cast<Word<T>>(count) * magic_bits<T>(k));
}

template <class T>
FUSEDOPT_HD bool is_nonfinite(T value) {
  return value - value != 0;
}

// What is known of all grads before a step, and whether the step takes place.
struct GradStatus {
  double grad_norm;  // of the grads divided by grad_scale
  int64_t nonfinite;
  float skip;  // above 0: the step changes nothing
  float unused;
};

// The highest bin whose sum is not 0, but not below the lowest own bin.
inline int top_bin(const NormSums& sums) {
  int top = kTopBin<double>;
  while (top > -kTopBin<double> && sums.bins[bin_index(top)] == 0) --top;
  return top;
}

// The norm of all grads, from their sums and the highest bin of these.
FUSEDOPT_HD double norm_of(const NormSums& sums, int top) {
  if (sums.nan > 0) return NAN;
  if (sums.infinite > 0) return INFINITY;
  double squares = 0;
  for (int k = kSlices - 1; k >= 0; --k)
    squares = squares * power_of_two<double>(-kSliceBits) +
              static_cast<double>(sums.bins[bin_index(top - k)]);
  return std::sqrt(squares) * power_of_two<double>(kGradBits * top);
}

// Decides from the sums. With `clips`, a norm that is not finite is a reason to skip as well.
FUSEDOPT_HD GradStatus finalize_norm(const NormSums& sums, int top, double grad_scale,
                                     bool found_inf, bool clips) {
  const double norm = norm_of(sums, top) / grad_scale;
  const int64_t nonfinite = sums.infinite + sums.nan;
  const bool skips = found_inf || nonfinite > 0 || (clips && is_nonfinite(norm));
  return {norm, nonfinite, skips ? 1.0f : 0.0f, 0};
}

}  // namespace fusedopt
