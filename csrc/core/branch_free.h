// Square roots and divisions in float without a branch, for GPUs. The compiler's own exact ones
// first look for rare operands, with a branch for each, and a GPU cannot overlap other work across
// these branches. Here rare operands are only remembered, in one number for all elements of a
// thread; if there was one, these elements are computed again with the compiler's own.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

// Reciprocals and reciprocal roots for which GPUs have an instruction. They are right but for the
// last bits, and take subnormals for zero. The host's versions are for the emulation.
struct Approximations {
  static FUSEDOPT_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
  }
  static FUSEDOPT_HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / square_root(x);
#endif
  }
};

// The larger one, or NaN if one is NaN, where the built-in functions would return the other one.
// Where all subnormal numbers are flushed, so are these: else to take a magnitude would cost an
// instruction more. Kernels that compute in double keep them.
template <bool kFlushes = true>
FUSEDOPT_HD float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  if constexpr (kFlushes)
    asm("max.NaN.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  else
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// Each result is an approximation and one correction by its residual, which an fma computes
// exactly. Subnormal floats are flushed. A residual that is flushed must be too small to matter,
// below 2^-26 of the operand, so operands are scaled up first.
// On an H200, the two sequences were compared to IEEE's results: the roots of all floats in
// [2^-101, 3e38], and 5.5e10 quotients of |n| in [2^-102, 2^60) and d in [2^-60, 2^22). No result
// differed. To scale operands by powers of two does not change that as long as nothing overflows or
// is flushed.
template <class Approximate = Approximations>
class BranchFree {
 public:
  static constexpr bool kIsForCodes = false;

  // The square root of `scaled`, which is at least 2^-101.
  static FUSEDOPT_HD float root(float scaled) {
    const float y = Approximate::reciprocal_root(scaled);
    const float about = scaled * y;
    const float r = fma(-about, about, scaled);
    return fma(r, 0.5f * y, about);
  }

  // scaled / denominator. The residual is negated, so that a quotient of -0 stays -0.
  static FUSEDOPT_HD float quotient(float scaled, float denominator) {
    const float about = Approximate::reciprocal(denominator);
    const float y = fma(about, fma(-denominator, about, 1.0f), about);
    const float near = scaled * y;
    const float minus_r = fma(denominator, near, -scaled);
    return fma(minus_r, -y, near);  // with -minus_r, a host may fold the signs and lose that of 0
  }

  // numerator / (sqrt(square) + eps), for square >= 0 and eps >= 0. All three are scaled by powers
  // of two: the square by 2^60, so its root and eps by 2^30, the numerator by 2^58, and the
  // quotient back by 2^-28.
  FUSEDOPT_HD float divide_by_root(float numerator, float square, float eps) {
    const float denominator = root(fma(square, 0x1p60f, zero_square(eps))) + eps * 0x1p30f;
    const float exact = quotient(opaque(numerator * 0x1p58f), denominator) * 0x1p-28f;
    largest_ = larger_or_nan(largest_, std::fabs(exact));
    return exact;
  }

  template <int kCount>
  FUSEDOPT_HD Pack<float, kCount> divide_by_root(Pack<float, kCount> numerator,
                                                 const Pack<float, kCount>& square,
                                                 const Pack<float, kCount>& eps) {
    for (int j = 0; j < kCount; ++j) numerator[j] = divide_by_root(numerator[j], square[j], eps[j]);
    return numerator;
  }

  // numerator / denominator, for denominator >= 0. The numerator is scaled as above, the quotient
  // back, and the denominator not at all: where a quotient is not exact, it overflows on the way,
  // or is NaN, or the denominator is so large that its reciprocal is flushed.
  FUSEDOPT_HD float divide(float numerator, float denominator) {
    const float exact = quotient(opaque(numerator * 0x1p58f), denominator) * 0x1p-58f;
    largest_ = larger_or_nan(largest_, larger_or_nan(std::fabs(exact), denominator));
    return exact;
  }

  // The square root. It is NaN for 0 (0 times infinity), for what overflows when it is scaled, and
  // for negative numbers: all of these are computed again.
  FUSEDOPT_HD float root_of(float square) {
    const float exact = root(square * 0x1p60f) * 0x1p-30f;
    largest_ = larger_or_nan(largest_, exact);
    return exact;
  }

  template <int kCount>
  FUSEDOPT_HD Pack<float, kCount> divide(Pack<float, kCount> numerator,
                                         const Pack<float, kCount>& denominator) {
    for (int j = 0; j < kCount; ++j) numerator[j] = divide(numerator[j], denominator[j]);
    return numerator;
  }

  template <int kCount>
  FUSEDOPT_HD Pack<float, kCount> root_of(Pack<float, kCount> square) {
    for (int j = 0; j < kCount; ++j) square[j] = root_of(square[j]);
    return square;
  }

  // Whether all results so far are IEEE's. They are not known to be if one is NaN or is this large;
  // what overflows on the way becomes NaN or larger than this.
  FUSEDOPT_HD bool is_exact() const { return largest_ < 0x1p97f; }

 private:
  // The same number, but the compiler cannot tell. Otherwise it would compute the negative of the
  // scaled numerator with a second multiplication, where negating an operand is free.
  static FUSEDOPT_HD float opaque(float number) {
#if defined(__CUDA_ARCH__)
    asm("" : "+f"(number));
#endif
    return number;
  }

  // What is added to every scaled square, so that the root of 0 is not NaN (0 times infinity). It
  // is lost beside any other square, and its root is lost beside eps. Where eps is too small for
  // that, nothing is added, and the root of 0 is NaN. Where eps is negative, or so large that its
  // reciprocal would be flushed, it is NaN itself. All NaNs are computed again.
  static FUSEDOPT_HD float zero_square(float eps) {
    if (!(eps >= 0 && eps < 0x1p90f)) return __builtin_nanf("");
    return eps < 0x1p-67f ? 0.0f : 0x1p-126f;
  }

  float largest_ = 0;  // magnitude of all quotients so far; takes one instruction for each
};

// The same in kernels for states that are codes.
struct BranchFreeForCodes : BranchFree<> {
  static constexpr bool kIsForCodes = true;
};

}  // namespace fusedopt
