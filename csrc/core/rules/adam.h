// Adam (Kingma and Ba, arXiv 1412.6980), with AMSGrad (Reddi et al., "On the Convergence of Adam
// and Beyond", 2018), and with L2 or decoupled weight decay (AdamW: Loshchilov and Hutter, arXiv
// 1711.05101).
#pragma once

#include <cmath>

#include "core/hyper.h"
#include "core/lanes.h"
#include "core/macros.h"
#include "core/normal.h"
#include "core/power.h"
#include "core/rules/moments.h"
#include "core/state_kind.h"
#include "core/two_float.h"

namespace fusedopt {

struct Adam {
  enum State { kExpAvg, kExpAvgSq, kMaxExpAvgSq, kNumStates };
  static constexpr bool is_second_moment(int state) { return state == kExpAvgSq; }
  static constexpr StateKind kind_of(int state) {
    return state == kExpAvg ? StateKind::kSigned : StateKind::kPositive;
  }

  // The bias corrections c1 = 1 - beta1^t and c2 = 1 - beta2^t are part of step_size and eps. That
  // leaves one square root and one division for each element: m_hat / (sqrt(v_hat) + eps) = m
  // sqrt(c2) / c1 / (sqrt(v) + eps sqrt(c2)).
  template <class T>
  struct Scalars {
    T grad_factor;  // -1 under maximize, times clipping, over grad_scale
    GradAverage<T> average;
    SquareAverage<T> square_average;
    T step_size;       // lr sqrt(1 - beta2^t) / (1 - beta1^t)
    T eps;             // eps sqrt(1 - beta2^t), but never rounded to 0
    T weight_decay;    // the L2 penalty
    TwoFloat<T> keep;  // what decoupled decay leaves of a weight, 1 - lr weight_decay

    template <class U>
    FUSEDOPT_HD Scalars<U> as() const {
      return {U(grad_factor),       average.template as<U>(), square_average.template as<U>(),
              U(step_size),         as_eps<U>(eps),           U(weight_decay),
              keep.template as<U>()};
    }
  };

  static FUSEDOPT_HD Scalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                             const GradInfo& grads) {
    const double correction1 = 1.0 - power(hyper.beta1, info.step);
    const double sqrt_correction2 = std::sqrt(1.0 - power(hyper.beta2, info.step));
    return {grad_factor(hyper, grads),
            grad_average(hyper.beta1),
            square_average(hyper.beta2),
            hyper.lr * sqrt_correction2 / correction1,
            scaled_eps(hyper.eps, sqrt_correction2),
            hyper.weight_decay,
            kept_by_decay(hyper)};
  }

  // Which terms there are. Those that torch leaves out are left out and not multiplied by 0, so
  // that infinities and NaNs act as in torch.
  struct Variant {
    Decay decay;
    bool amsgrad;
    bool averages_grads;  // beta1 is not 0; if it is 0, exp_avg is the grad and is not stored

    constexpr int number() const {
      return (static_cast<int>(decay) * 2 + (amsgrad ? 1 : 0)) * 2 + (averages_grads ? 1 : 0);
    }
    static FUSEDOPT_HD constexpr Variant of(int number) {
      return {static_cast<Decay>(number / 4), number / 2 % 2 != 0, number % 2 != 0};
    }
    constexpr bool uses(int state) const {
      return state == kExpAvg ? averages_grads : state == kExpAvgSq || amsgrad;
    }
  };
  static constexpr int kNumVariants = kNumDecays * 4;
  static Variant variant(const HyperParams& hyper) {
    return {decay_of(hyper), hyper.amsgrad, hyper.beta1 != 0};
  }

  // The update of one element, or of several side by side.
  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const Scalars<T>& scalars, Math& math, V& param,
                                 V grad, States& state) {
    const V second_moment = update_moments(variant, scalars, param, grad, state);
    if (variant.decay == Decay::kDecoupled) param = scalars.keep.times(param);
    const V ratio = math.divide_by_root(state[kExpAvg], second_moment, V(scalars.eps));
    param = fma(V(-scalars.step_size), ratio, param);
  }

  // The grad becomes what the averages are of. Returns the second moment to divide by.
  template <class T, class V, class States>
  static FUSEDOPT_HD V update_moments(Variant variant, const Scalars<T>& scalars, const V& param,
                                      V& grad, States& state) {
    V &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    grad = grad * V(scalars.grad_factor);
    if (variant.decay == Decay::kL2) grad = fma(V(scalars.weight_decay), param, grad);

    exp_avg_sq = scalars.square_average(exp_avg_sq, grad);
    if (variant.averages_grads)
      exp_avg = scalars.average(exp_avg, grad);
    else
      exp_avg = grad;

    V second_moment = exp_avg_sq;
    if (variant.amsgrad) {
      // As torch.maximum: if either side is NaN, so is the result. Adding 0 makes a result of
      // arithmetic of the number that was loaded: subnormals are flushed and NaNs are quiet.
      V& largest = state[kMaxExpAvgSq];
      largest = largest + V(0);
      largest = select(exp_avg_sq > largest, exp_avg_sq, largest);
      largest = select(exp_avg_sq != exp_avg_sq, exp_avg_sq, largest);
      second_moment = largest;
    }
    return second_moment;
  }
};

}  // namespace fusedopt
