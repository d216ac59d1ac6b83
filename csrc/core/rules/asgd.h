// Averaged SGD (Polyak and Juditsky, "Acceleration of stochastic approximation by averaging",
// 1992), in torch's form.
#pragma once

#include "core/power.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Asgd {
  enum State { kAx, kNumStates };
  static constexpr bool is_second_moment(int) { return false; }
  static constexpr StateKind kind_of(int) { return StateKind::kExact; }
  // How far the average moves towards the param, and what lambd leaves of the param, a TwoFloat.
  enum Own { kMu, kKept, kKeptRest };

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    const double done = static_cast<double>(info.step - 1), averaged = done - hyper.t0;
    const double eta = hyper.lr / real_power(1.0 + hyper.lambd * hyper.lr * done, hyper.alpha);
    scalars.step_size = eta;
    const TwoFloat<double> kept = two_float(1.0 - hyper.lambd * eta);
    scalars.own[kKept] = kept.high;
    scalars.own[kKeptRest] = kept.rest;
    scalars.own[kMu] = done > 0 && averaged > 1.0 ? 1.0 / averaged : 1.0;
    return scalars;
  }

  using Variant = DecayVariant;
  static constexpr int kNumVariants = kNumDecays;
  static Variant variant(const HyperParams& hyper) { return {decay_of(hyper)}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math&, V& param,
                                 V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    const TwoFloat<T> kept = {scalars.own[kKept], scalars.own[kKeptRest]};
    param = kept.times(decayed(variant.decay, scalars, param));
    param = fma(V(-scalars.step_size), grad, param);
    V& ax = state[kAx];
    if (scalars.own[kMu] == 1)
      ax = param;
    else
      ax = fma(V(scalars.own[kMu]), param - ax, ax);
  }
};

}  // namespace fusedopt
