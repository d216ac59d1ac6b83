// Averaged SGD (Polyak and Juditsky, "Acceleration of stochastic approximation by averaging",
// 1992), in torch's form.
#pragma once

#include "core/power.h"
#include "core/rules/shared_scalars.h"

namespace fusedopt {

struct Asgd {
  enum State { kAx, kNumStates };
  static constexpr bool is_second_moment(int) { return false; }
  enum Own { kMu };  // how far the average moves towards the param

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    const double done = static_cast<double>(info.step - 1), averaged = done - hyper.t0;
    const double eta = hyper.lr / real_power(1.0 + hyper.lambd * hyper.lr * done, hyper.alpha);
    scalars.step_size = eta;
    scalars.keep = two_float(1.0 - hyper.lambd * eta);
    scalars.own[kMu] = averaged > 1.0 ? 1.0 / averaged : 1.0;
    return scalars;
  }

  using Variant = DecayVariant;
  static constexpr int kNumVariants = kNumDecays;
  static Variant variant(const HyperParams& hyper) { return {decay_of(hyper)}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math&, V& param,
                                 V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    param = fma(V(-scalars.step_size), grad, scalars.keep.times(param));
    V& ax = state[kAx];
    if (scalars.own[kMu] == 1)
      ax = param;
    else
      ax = fma(V(scalars.own[kMu]), param - ax, ax);
  }
};

}  // namespace fusedopt
