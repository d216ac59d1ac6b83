#pragma once

#include <cmath>
#include <cstdint>

#include "core/lanes.h"
#include "core/macros.h"

// Square roots and divisions in float without a branch. The compiler's own exact ones look for rare
// operands first, a branch for each, through which a GPU overlaps nothing. Here the rare ones are
// only remembered, and then all elements of a thread are done again, in another way.
namespace fusedopt {

// What GPUs have an instruction for, right but for the last bits; subnormals count as zero.
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

// Subnormal floats are flushed. A residual that is flushed must be too small to matter, below 2^-26
// of the operand, so operands are scaled up first. On an H200, the two sequences were compared to
// IEEE's results: the roots of all floats in [2^-101, 3e38], 5.5e10 quotients of |n| in
// [2^-102, 2^60) and d in [2^-60, 2^22). No result differed. Powers of two do not change that as
// long as nothing overflows or is flushed.
template <class Approximate = Approximations>
class BranchFree {
 public:
  // The root of `scaled`, of at least 2^-101.
  static FUSEDOPT_HD float root(float scaled) {
    const float y = Approximate::reciprocal_root(scaled);
    const float about = scaled * y;
    const float r = fma(-about, about, scaled);
    return fma(r, 0.5f * y, about);
  }

  // scaled / denominator. The residual has its sign so that -0 stays -0.
  static FUSEDOPT_HD float quotient(float scaled, float denominator) {
    const float about = Approximate::reciprocal(denominator);
    const float y = fma(about, fma(-denominator, about, 1.0f), about);
    const float near = scaled * y;
    const float minus_r = fma(denominator, near, -scaled);
    return fma(minus_r, -y, near);  // with -minus_r, a host may fold the signs and lose that of 0
  }

  // numerator / (the root of `square` + eps), with square and eps of at least 0.
  FUSEDOPT_HD float divide_by_root(float numerator, float square, float eps) {
    const float denominator = root(fma(square, 0x1p60f, zero_square(eps))) + eps * 0x1p30f;
    const float exact = quotient(opaque(numerator * 0x1p58f), denominator) * 0x1p-28f;
    largest_ = larger(largest_, std::fabs(exact));
    return exact;
  }

  template <int kCount>
  FUSEDOPT_HD Pack<float, kCount> divide_by_root(Pack<float, kCount> numerator,
                                                 const Pack<float, kCount>& square,
                                                 const Pack<float, kCount>& eps) {
    for (int j = 0; j < kCount; ++j) numerator[j] = divide_by_root(numerator[j], square[j], eps[j]);
    return numerator;
  }

  // Whether all results so far are IEEE's: false if there was a NaN, and what overflows on the way
  // becomes one, or larger than this.
  FUSEDOPT_HD bool is_exact() const { return largest_ < 0x1p97f; }

 private:
  // Else the compiler multiplies once more, where to negate costs nothing.
  static FUSEDOPT_HD float opaque(float number) {
#if defined(__CUDA_ARCH__)
    asm("" : "+f"(number));
#endif
    return number;
  }

  // Beside any other square this is lost, but the root of 0 is not NaN with it, and lost beside
  // eps. Where eps is too small for that, it is NaN, as it is where eps is negative, or so large
  // that its reciprocal would be flushed.
  static FUSEDOPT_HD float zero_square(float eps) {
    if (!(eps >= 0 && eps < 0x1p90f)) return __builtin_nanf("");
    return eps < 0x1p-67f ? 0.0f : 0x1p-126f;
  }

  // NaN if one of them is: the built-in functions would give the other one.
  static FUSEDOPT_HD float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("max.NaN.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a > b || a != a ? a : b;
#endif
  }

  float largest_ = 0;  // of all quotients so far: one instruction for each
};

}  // namespace fusedopt
