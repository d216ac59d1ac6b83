// Adagrad (Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and
// Stochastic Optimization", 2011), in torch's form.
#pragma once

#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Adagrad {
  enum State { kUnused, kSum, kNumStates };  // second moments have the cheapest draws there
  static constexpr bool is_second_moment(int state) { return state == kSum; }
  static constexpr StateKind kind_of(int) { return StateKind::kExact; }

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.step_size = hyper.lr / (1.0 + static_cast<double>(info.step - 1) * hyper.lr_decay);
    return scalars;
  }

  struct Variant : DecayVariant {
    static FUSEDOPT_HD constexpr Variant of(int number) { return {DecayVariant::of(number)}; }
    constexpr bool uses(int state) const { return state == kSum; }
  };
  static constexpr int kNumVariants = kNumDecays;
  static Variant variant(const HyperParams& hyper) { return {{decay_of(hyper)}}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math& math,
                                 V& param, V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V& sum = state[kSum];
    sum = fma(grad, grad, sum);
    param = decayed(variant.decay, scalars, param);
    const V ratio = math.divide_by_root(grad, sum, V(scalars.eps));
    param = fma(V(-scalars.step_size), ratio, param);
  }
};

}  // namespace fusedopt
