// Adadelta (Zeiler, arXiv 1212.5701), with torch's learning rate.
#pragma once

#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Adadelta {
  enum State { kAccDelta, kSquareAvg, kNumStates };
  static constexpr bool is_second_moment(int) { return true; }
  static constexpr StateKind kind_of(int) { return StateKind::kPositive; }

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.set(square_average(hyper.rho));
    return scalars;
  }

  using Variant = DecayVariant;
  static constexpr int kNumVariants = kNumDecays;
  static Variant variant(const HyperParams& hyper) { return {decay_of(hyper)}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math& math,
                                 V& param, V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V &square = state[kSquareAvg], &acc_delta = state[kAccDelta];
    square = scalars.square_average()(square, grad);
    const V root = math.root_of(acc_delta + V(scalars.eps));
    const V delta = math.divide_by_root(root * grad, square + V(scalars.eps), V(0));
    acc_delta = scalars.square_average()(acc_delta, delta);
    param = decayed(variant.decay, scalars, param);
    param = fma(V(-scalars.step_size), delta, param);
  }
};

}  // namespace fusedopt
