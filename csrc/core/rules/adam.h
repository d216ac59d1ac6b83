#pragma once

#include <cmath>

#include "core/factor.h"
#include "core/macros.h"
#include "core/normal.h"
#include "core/rules/decay.h"

// Adam (Kingma and Ba, arXiv 1412.6980), with AMSGrad (Reddi et al., "On the Convergence of Adam
// and Beyond", 2018), L2 or decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).
namespace fusedopt {

template <class T>
struct AdamScalars {
  T grad_factor;      // -1 under maximize, times 1 / grad_scale
  T exp_avg_weight;   // 1 - beta1, or -beta1 when the interpolation starts from the grad
  T exp_avg_to_grad;  // not 0 if beta1 <= 0.5: interpolate from the grad, the nearer end
  Factor<T> beta2;
  Factor<T> one_minus_beta2;
  T step_size;     // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  T eps;           // eps sqrt(1 - beta2^t), but never rounded to 0
  T weight_decay;  // the L2 penalty
  Factor<T> keep;  // what decoupled decay leaves, 1 - lr weight_decay

  template <class U>
  FUSEDOPT_HD AdamScalars<U> as() const {
    return {U(grad_factor),
            U(exp_avg_weight),
            U(exp_avg_to_grad),
            beta2.template as<U>(),
            one_minus_beta2.template as<U>(),
            U(step_size),
            eps > 0 && U(eps) < kSmallestNormal<U> ? kSmallestNormal<U> : U(eps),
            U(weight_decay),
            keep.template as<U>()};
  }
};

// One element. The bias corrections stand in step_size and eps, which leaves one square root and
// one division: m_hat / (sqrt(v_hat) + eps) = m sqrt(c2) / c1 / (sqrt(v) + eps sqrt(c2)).
template <class T, Decay kDecay, bool kAmsgrad>
struct Adam {
  static constexpr int kNumStates = kAmsgrad ? 3 : 2;
  AdamScalars<T> scalars;

  // max_exp_avg_sq is left alone without amsgrad.
  FUSEDOPT_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq,
                              T& max_exp_avg_sq) const {
    grad *= scalars.grad_factor;
    if constexpr (kDecay == Decay::kL2) grad = std::fma(scalars.weight_decay, param, grad);

    // m + (1 - beta1) (g - m) rounds less than beta1 m + (1 - beta1) g. The second moment keeps
    // torch's form instead: once it has overflowed it stays inf, where a difference gives NaN.
    exp_avg = std::fma(scalars.exp_avg_weight, grad - exp_avg,
                       scalars.exp_avg_to_grad != 0 ? grad : exp_avg);
    exp_avg_sq =
        std::fma(scalars.one_minus_beta2.times(grad), grad, scalars.beta2.times(exp_avg_sq));

    T second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) {
      // As torch.maximum: a NaN on either side wins.
      const bool take = exp_avg_sq > max_exp_avg_sq || exp_avg_sq != exp_avg_sq;
      max_exp_avg_sq = take ? exp_avg_sq : max_exp_avg_sq;
      second_moment = max_exp_avg_sq;
    }
    const T denominator = std::sqrt(second_moment) + scalars.eps;
    if constexpr (kDecay == Decay::kDecoupled) param = scalars.keep.times(param);
    param = std::fma(-scalars.step_size, exp_avg / denominator, param);
  }
};

// The rule as drivers see it: its variants by number, to be compiled one by one.
struct AdamFamily {
  template <class T>
  using Scalars = AdamScalars<T>;
  static constexpr int kMaxStates = 3;  // of a variant
  static constexpr int kNumVariants = 6;
  static constexpr int variant(Decay decay, bool amsgrad) {
    return static_cast<int>(decay) * 2 + (amsgrad ? 1 : 0);
  }
  template <class T, int kVariant>
  using Rule = Adam<T, static_cast<Decay>(kVariant / 2), kVariant % 2 != 0>;
};

}  // namespace fusedopt
