// Adamax (Kingma and Ba, arXiv 1412.6980, algorithm 2), with torch's place for eps.
#pragma once

#include "core/power.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Adamax {
  enum State { kExpAvg, kExpInf, kNumStates };
  // A decay rounded to nearest would leave it as it is.
  static constexpr bool is_second_moment(int state) { return state == kExpInf; }
  static constexpr StateKind kind_of(int state) {
    return state == kExpAvg ? StateKind::kSigned : StateKind::kPositive;
  }

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.step_size = hyper.lr / (1.0 - power(hyper.beta1, info.step));
    scalars.average = grad_average(hyper.beta1);
    scalars.set(square_average(hyper.beta2));
    return scalars;
  }

  using Variant = DecayVariant;
  static constexpr int kNumVariants = kNumDecays;
  static Variant variant(const HyperParams& hyper) { return {decay_of(hyper)}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math& math,
                                 V& param, V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V &exp_avg = state[kExpAvg], &exp_inf = state[kExpInf];
    exp_avg = scalars.average(exp_avg, grad);
    // As torch.maximum: if either side is NaN, so is the result.
    const V magnitude = select(grad < V(0), V(0) - grad, grad) + V(scalars.eps);
    const V decayed_inf = scalars.square_average().decay.times(exp_inf);
    exp_inf = select(magnitude > decayed_inf, magnitude, decayed_inf);
    exp_inf = select(magnitude != magnitude, magnitude, exp_inf);
    param = decayed(variant.decay, scalars, param);
    const V ratio = math.divide(exp_avg, exp_inf);
    param = fma(V(-scalars.step_size), ratio, param);
  }
};

}  // namespace fusedopt
