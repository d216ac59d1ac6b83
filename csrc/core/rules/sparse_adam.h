// Adam (Kingma and Ba, arXiv 1412.6980) for rows that have a grad, as torch.optim.SparseAdam:
// there, eps is added to the root of a second moment whose bias is not corrected.
#pragma once

#include <cmath>

#include "core/power.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct SparseAdam {
  enum State { kExpAvg, kExpAvgSq, kNumStates };
  static constexpr bool is_second_moment(int state) { return state == kExpAvgSq; }
  static constexpr StateKind kind_of(int) { return StateKind::kExact; }

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.step_size *=
        std::sqrt(1.0 - power(hyper.beta2, info.step)) / (1.0 - power(hyper.beta1, info.step));
    scalars.average = grad_average(hyper.beta1);
    scalars.set(square_average(hyper.beta2));
    return scalars;
  }

  using Variant = OnlyVariant;
  static constexpr int kNumVariants = 1;
  static Variant variant(const HyperParams&) { return {}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant, const SharedScalars<T>& scalars, Math& math, V& param,
                                 V grad, States& state) {
    grad = grad * V(scalars.grad_factor);
    V &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    exp_avg = scalars.average(exp_avg, grad);
    exp_avg_sq = scalars.square_average()(exp_avg_sq, grad);
    const V ratio = math.divide_by_root(exp_avg, exp_avg_sq, V(scalars.eps));
    param = fma(V(-scalars.step_size), ratio, param);
  }
};

}  // namespace fusedopt
