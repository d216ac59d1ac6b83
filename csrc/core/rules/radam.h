// RAdam (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265),
// with torch's place for eps.
#pragma once

#include <cmath>

#include "core/power.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Radam {
  enum State { kExpAvg, kExpAvgSq, kNumStates };
  static constexpr bool is_second_moment(int state) { return state == kExpAvgSq; }
  static constexpr StateKind kind_of(int state) {
    return state == kExpAvg ? StateKind::kSigned : StateKind::kPositive;
  }
  // Not 0: the second moment is known well enough to divide by it.
  enum Own { kIsRectified = kSquareAverageScalars };

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    const double decay2 = power(hyper.beta2, info.step), correction2 = 1.0 - decay2;
    // The length of the simple moving average that the second moment stands for, and its limit.
    const double limit = 2.0 / (1.0 - hyper.beta2) - 1.0;
    const double length = limit - 2.0 * static_cast<double>(info.step) * decay2 / correction2;
    scalars.average = grad_average(hyper.beta1);
    scalars.set(square_average(hyper.beta2));
    scalars.step_size = hyper.lr / (1.0 - power(hyper.beta1, info.step));
    if (length > 5.0) {
      const double rectification = std::sqrt((length - 4.0) * (length - 2.0) * limit /
                                             ((limit - 4.0) * (limit - 2.0) * length));
      scalars.own[kIsRectified] = 1;
      scalars.step_size *= rectification * std::sqrt(correction2);
    }
    return scalars;
  }

  using Variant = CautiousDecayVariant;
  static constexpr int kNumVariants = Variant::kNumbers;
  static Variant variant(const HyperParams& hyper) {
    return {{decay_of(hyper)}, caution_of(hyper)};
  }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math& math,
                                 V& param, V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    exp_avg = scalars.average(exp_avg, grad);
    exp_avg_sq = scalars.square_average()(exp_avg_sq, grad);
    V direction = exp_avg;
    if (scalars.own[kIsRectified] != 0)
      direction = math.divide_by_root(exp_avg, exp_avg_sq, V(scalars.eps));
    direction = careful(variant.caution, direction, grad);
    param = decayed(variant.decay, variant.caution, scalars.decay,
                    signed_as(scalars.step_size, direction), param);
    param = fma(V(-scalars.step_size), direction, param);
  }
};

}  // namespace fusedopt
