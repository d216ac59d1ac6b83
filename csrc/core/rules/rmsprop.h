// RMSprop (Tieleman and Hinton, "Lecture 6.5", 2012), with momentum, and centered as in Graves,
// "Generating Sequences With Recurrent Neural Networks" (arXiv 1308.0850), in torch's form.
#pragma once

#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Rmsprop {
  enum State { kMomentumBuffer, kSquareAvg, kGradAvg, kNumStates };
  static constexpr bool is_second_moment(int state) { return state == kSquareAvg; }
  static constexpr StateKind kind_of(int state) {
    return state == kSquareAvg ? StateKind::kPositive : StateKind::kSigned;
  }
  enum Own { kMomentum = kSquareAverageScalars };

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.average = grad_average(hyper.alpha);
    scalars.set(square_average(hyper.alpha));
    scalars.own[kMomentum] = hyper.momentum;
    return scalars;
  }

  struct Variant {
    Decay decay;
    bool has_momentum;
    bool centered;

    constexpr int number() const {
      return (static_cast<int>(decay) * 2 + (has_momentum ? 1 : 0)) * 2 + (centered ? 1 : 0);
    }
    static FUSEDOPT_HD constexpr Variant of(int number) {
      return {static_cast<Decay>(number / 4), number / 2 % 2 != 0, number % 2 != 0};
    }
    constexpr bool uses(int state) const {
      return state == kSquareAvg || (state == kMomentumBuffer ? has_momentum : centered);
    }
  };
  static constexpr int kNumVariants = kNumDecays * 4;
  static Variant variant(const HyperParams& hyper) {
    return {decay_of(hyper), hyper.momentum > 0, hyper.centered};
  }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math& math,
                                 V& param, V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V square = state[kSquareAvg] = scalars.square_average()(state[kSquareAvg], grad);
    if (variant.centered) {
      V& mean = state[kGradAvg];
      mean = scalars.average(mean, grad);
      square = fma(V(0) - mean, mean, square);  // the variance, which rounding must not make < 0
      square = select(square < V(0), V(0), square);
    }
    V update = math.divide_by_root(grad, square, V(scalars.eps));
    if (variant.has_momentum) {
      V& buffer = state[kMomentumBuffer];
      update = buffer = fma(V(scalars.own[kMomentum]), buffer, update);
    }
    param = decayed(variant.decay, scalars, param);
    param = fma(V(-scalars.step_size), update, param);
  }
};

}  // namespace fusedopt
