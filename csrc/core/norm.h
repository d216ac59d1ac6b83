// The global norm of the grads. Its bits depend on the grads alone: not on their order, nor on how
// they are divided among registers, threads, devices and processes. Sums of floating-point numbers
// depend on their order; so the squares are cut into integers on a grid, and integers are summed:
// J. Demmel, H. D. Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers 64
// (2015); P. Ahrens, J. Demmel, H. D. Nguyen, "Algorithms for Efficient Reproducible Floating Point
// Summation", ACM TOMS 46 (2020).
//
// The grid has a bin for every kSliceBits binary digits of squares: that of number b counts
// multiples of 2^(kSliceBits b). A square is rounded to a multiple of that, its slice for bin b;
// what is left is rounded to a multiple of 2^(kSliceBits (b-1)), and so on, always to the nearest.
// All of it is exact, and a slice is at most 2^(kSliceBits-1). To find the slices of bins b and
// below, the grad is multiplied by 2^(-kGradBits b), half as many digits, before it is squared.
// That rounds nothing, the first slice is then in units of 1, and no square overflows; one that
// underflows has no slice that is not 0.
//
// A square's own bin is the highest one in which its slice is not 0, where it is above 0. Whoever
// sums finds slices for kSlices bins, from the highest own bin that it has met down; those above
// are all 0. The result has the kSlices bins from the highest one down whose sum is not 0. That is
// the highest own bin of all, so every square has been counted in each of these bins, and what is
// in lower ones is left out. Hence it makes no difference who has met what.
//
// Grads of at most 32 bits are squared in float, which rounds each square, and float64 in double.
// Each of the two types has a grid of its own, and the norm is made from what both have. Subnormal
// doubles lose digits; subnormal floats are 0, as everywhere.
//
// What is left out of a square is, in float, at most 2^-44 of the largest one, and in double 2^-60.
// So the sum of N squares of floats is right to N 2^-44 of the largest at the very worst: if one is
// 2^44 times as large as all others, and these are just too small to be counted. Squares that are
// above 2^-20 of the largest lose nothing to the grid in float, and smaller ones lose digits up or
// down: of ordinary grads, what is left out is far below what their squares were rounded by. A bin
// has room for 2^42 squares in float, and for 2^44 in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/bits.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// What the bits of a number mean, and the grid of its squares.
template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Word = uint32_t;
  using Signed = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr Word kRootOfTwo = 0x3504f3;  // mantissa of the largest x with x * x <= 2
  static constexpr int kSlices = 3;
  static constexpr int kGradBits = 11;       // a bin has this many binary digits of grads
  static constexpr int kMostSquares = 1023;  // whose slices a word has room for
};
template <>
struct FloatBits<double> {
  using Word = uint64_t;
  using Signed = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr Word kRootOfTwo = 0x6a09e667f3bcc;
  static constexpr int kSlices = 4;
  static constexpr int kGradBits = 10;
  static constexpr int kMostSquares = INT32_MAX;
};
template <class T>
using Word = typename FloatBits<T>::Word;
template <class T>
inline constexpr int kSlices = FloatBits<T>::kSlices;
template <class T>
inline constexpr int kGradBits = FloatBits<T>::kGradBits;
template <class T>
inline constexpr int kSliceBits = 2 * kGradBits<T>;

template <class T>
inline constexpr Word<T> kInfinityBits =
    Word<T>{2 * FloatBits<T>::kBias + 1} << FloatBits<T>::kMantissa;

// The highest own bin of a T; the lowest is -kTopBin.
template <class T>
inline constexpr int kTopBin = (FloatBits<T>::kBias - 1) / kGradBits<T>;

template <class T>
constexpr bool is_grid() {
  using Bits = FloatBits<T>;
  const bool has_all = kGradBits<T> * kTopBin<T> + kGradBits<T> - 1 > Bits::kBias;
  const int64_t most = std::numeric_limits<typename Bits::Signed>::max();
  return has_all && Bits::kMostSquares <= most >> (kSliceBits<T> - 1);
}
static_assert(is_grid<float>() && is_grid<double>(), "grads or sums of slices are too large");

// The sums of slices of one type, by the number of the bin.
template <class T>
struct Bins {
  static constexpr int kLowest = -kTopBin<T> - (kSlices<T> - 1);

  int64_t sums[kTopBin<T> - kLowest + 1];

  FUSEDOPT_HD int64_t& operator[](int bin) { return sums[bin - kLowest]; }
  FUSEDOPT_HD int64_t operator[](int bin) const { return sums[bin - kLowest]; }

  Bins& operator+=(const Bins& other) {
    for (int bin = kLowest; bin <= kTopBin<T>; ++bin) (*this)[bin] += other[bin];
    return *this;
  }
};

// What is known of a set of grads: the sums of slices, and how many are infinite or NaN. Those of
// two sets are added, word by word, to those of both.
struct NormSums {
  Bins<float> in_float;
  Bins<double> in_double;
  int64_t infinite;
  int64_t nan;

  NormSums& operator+=(const NormSums& other) {
    in_float += other.in_float;
    in_double += other.in_double;
    infinite += other.infinite;
    nan += other.nan;
    return *this;
  }
};
inline constexpr int64_t kNormWords = sizeof(NormSums) / sizeof(int64_t);

template <class T>
FUSEDOPT_HD Bins<T>& bins_of(NormSums& sums) {
  if constexpr (sizeof(T) == sizeof(float))
    return sums.in_float;
  else
    return sums.in_double;
}

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
  return power_of_two<T>(-kGradBits<T> * bin);
}

// Numbers near this one have the unit of slice number k as their last digit.
template <class T>
FUSEDOPT_HD constexpr Word<T> magic_bits(int k) {
  using Bits = FloatBits<T>;
  return (static_cast<Word<T>>(Bits::kBias + Bits::kMantissa - kSliceBits<T> * k)
          << Bits::kMantissa) +
         (Word<T>{1} << (Bits::kMantissa - 1));
}

// The own bin of a square, by the bits of the grad's magnitude, which is finite.
template <class T>
FUSEDOPT_HD int own_bin(Word<T> magnitude) {
  using Bits = FloatBits<T>;
  constexpr Word<T> kBin = Word<T>{kGradBits<T>} << Bits::kMantissa;
  constexpr Word<T> kLowest =  // the largest grad of the lowest bin
      (Word<T>{Bits::kBias + kGradBits<T> - 1 - kGradBits<T> * kTopBin<T>} << Bits::kMantissa) +
      Bits::kRootOfTwo;
  const Word<T> above = magnitude > kLowest ? magnitude - kLowest : 0;
  return static_cast<int>((above + kBin - 1) / kBin) - kTopBin<T>;
}

// Whether the squares of what is stored so are exact in float: it has at most 11 digits.
template <class Storage>
inline constexpr bool kHasExactSquares = sizeof(Storage) == 2;

// Adds a square's slices, each in the place of its bits above those of a magic number: the sum has
// those once for each square. With kFirst, `square` is what the slices above have left of it. The
// last magic number is added while the slice before it is taken off. It is a multiple of that
// slice's unit, so that nothing is rounded before.
template <class T, int kFirst = 0, class V, class Words>
FUSEDOPT_HD void add_slices(V square, Words (&sums)[kSlices<T>]) {
  constexpr int kLast = kSlices<T> - 1;
  for (int k = kFirst; k < kLast; ++k) {
    const T magic = bit_cast<T>(magic_bits<T>(k));
    const T next = k + 1 < kLast ? 0 : bit_cast<T>(magic_bits<T>(kLast));
    const V rounded = square + magic;
    sums[k] = sums[k] + as_bits(rounded);
    square = square - (rounded - V(magic + next));
  }
  sums[kLast] = sums[kLast] + as_bits(square);
}

// Adds the slices of the square of a scaled grad. `seen` is then above kMostSeen if this square, or
// one before, has a slice above the first: it is the largest square, by its bits. With kExact, for
// squares that are exact and where fma() is fast, it takes fewer operations: fma() squares for
// nothing, and `seen` has all bits that the numbers with a first slice had. Among these is the
// digit of 2^(kSliceBits-1), or a higher one, if a square is above that; no number of 11 digits has
// a square within a unit of it.
template <class T, bool kExact, class V, class Words>
FUSEDOPT_HD void add_square(V scaled, Words (&sums)[kSlices<T>], Words& seen) {
  if constexpr (kExact) {
    const V magic = bit_cast<T>(magic_bits<T>(0));
    const V rounded = fma(scaled, scaled, magic);
    seen = seen | as_bits(rounded);
    sums[0] = sums[0] + as_bits(rounded);
    add_slices<T, 1>(fma(scaled, scaled, magic - rounded), sums);
  } else {
    const V square = scaled * scaled;
    seen = larger(seen, as_bits(square));
    add_slices<T>(square, sums);
  }
}
template <class T, bool kExact>
inline constexpr Word<T> kMostSeen =
    kExact ? magic_bits<T>(0) + (Word<T>{1} << (kSliceBits<T> - 1)) - 1
           : Word<T>{FloatBits<T>::kBias + kSliceBits<T> - 1} << FloatBits<T>::kMantissa;

// What add_square() has added of slice number k for `count` squares.
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

// The highest bins of each type whose sum is not 0, but not below the lowest own bin.
struct HighestBins {
  int in_float = -kTopBin<float>;
  int in_double = -kTopBin<double>;
};

template <class T>
int highest_bin(const Bins<T>& bins) {
  int highest = kTopBin<T>;
  while (highest > -kTopBin<T> && bins[highest] == 0) --highest;
  return highest;
}
inline HighestBins highest_bins(const NormSums& sums) {
  return {highest_bin(sums.in_float), highest_bin(sums.in_double)};
}

// A sum of squares, in units of 4^exponent.
struct ScaledSum {
  double value;
  int exponent;
};

template <class T>
FUSEDOPT_HD ScaledSum sum_from(const Bins<T>& bins, int highest) {
  double value = 0;
  for (int k = kSlices<T> - 1; k >= 0; --k)
    value = value * power_of_two<double>(-kSliceBits<T>) + static_cast<double>(bins[highest - k]);
  return {value, kGradBits<T> * highest};
}

// The root of both sums, where `large` has the larger unit or `small` is 0.
FUSEDOPT_HD double root_of(ScaledSum large, ScaledSum small) {
  double squares = large.value;
  if (small.value > 0) {
    const int below = large.exponent - small.exponent;
    squares += small.value * power_of_two<double>(-2 * (below < 500 ? below : 500));
  }
  return std::sqrt(squares) * power_of_two<double>(large.exponent);
}

// The norm of all grads, from their sums and the highest bins of these.
FUSEDOPT_HD double norm_of(const NormSums& sums, const HighestBins& highest) {
  if (sums.nan > 0) return NAN;
  if (sums.infinite > 0) return INFINITY;
  const ScaledSum in_float = sum_from(sums.in_float, highest.in_float);
  const ScaledSum in_double = sum_from(sums.in_double, highest.in_double);
  const bool is_double_larger = in_double.value > 0 && in_double.exponent > in_float.exponent;
  return is_double_larger || in_float.value == 0 ? root_of(in_double, in_float)
                                                 : root_of(in_float, in_double);
}

// Decides from the sums. With `clips`, a norm that is not finite is a reason to skip as well.
FUSEDOPT_HD GradStatus finalize_norm(const NormSums& sums, const HighestBins& highest,
                                     double grad_scale, bool found_inf, bool clips) {
  const double norm = norm_of(sums, highest) / grad_scale;
  const int64_t nonfinite = sums.infinite + sums.nan;
  const bool skips = found_inf || nonfinite > 0 || (clips && is_nonfinite(norm));
  return {norm, nonfinite, skips ? 1.0f : 0.0f, 0};
}

}  // namespace fusedopt
