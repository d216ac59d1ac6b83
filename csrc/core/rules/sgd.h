// Momentum SGD in the form of torch.optim.SGD: v <- momentum v + (1 - dampening) g, p <- p - lr v,
// where lr scales the buffer when it is applied and not when it is filled. Nesterov momentum as in
// Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013).
// Weight decay as an L2 penalty, or decoupled (SGDW: Loshchilov and Hutter, arXiv 1711.05101).
#pragma once

#include "core/hyper.h"
#include "core/lanes.h"
#include "core/macros.h"
#include "core/state_kind.h"
#include "core/two_float.h"

namespace fusedopt {

struct Sgd {
  enum State { kMomentumBuffer, kNumStates };
  static constexpr bool is_second_moment(int) { return false; }
  static constexpr StateKind kind_of(int) { return StateKind::kSigned; }

  template <class T>
  struct Scalars {
    T grad_factor;  // -1 under maximize, times clipping, over grad_scale
    T lr;
    T momentum;
    T grad_weight;     // 1 - dampening; 1 on a parameter's first step
    T weight_decay;    // the L2 penalty
    TwoFloat<T> keep;  // what decoupled decay leaves of a weight, 1 - lr weight_decay

    template <class U>
    FUSEDOPT_HD Scalars<U> as() const {
      return {U(grad_factor), U(lr),           U(momentum),
              U(grad_weight), U(weight_decay), keep.template as<U>()};
    }
  };

  static FUSEDOPT_HD Scalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                             const GradInfo& grads) {
    return {grad_factor(hyper, grads),
            hyper.lr,
            hyper.momentum,
            info.is_first ? 1.0 : 1.0 - hyper.dampening,
            hyper.weight_decay,
            kept_by_decay(hyper)};
  }

  enum class Momentum { kNone, kHeavyBall, kNesterov };

  // Which terms there are. Those that torch leaves out are left out and not multiplied by 0, so
  // that infinities and NaNs act as in torch.
  struct Variant {
    Momentum momentum;
    Decay decay;

    constexpr int number() const {
      return static_cast<int>(momentum) * kNumDecays + static_cast<int>(decay);
    }
    static FUSEDOPT_HD constexpr Variant of(int number) {
      return {static_cast<Momentum>(number / kNumDecays), static_cast<Decay>(number % kNumDecays)};
    }
    constexpr bool uses(int) const { return momentum != Momentum::kNone; }
  };
  static constexpr int kNumVariants = 3 * kNumDecays;
  static Variant variant(const HyperParams& hyper) {
    return {hyper.momentum == 0 ? Momentum::kNone
            : hyper.nesterov    ? Momentum::kNesterov
                                : Momentum::kHeavyBall,
            decay_of(hyper)};
  }

  // The update of one element, or of several side by side.
  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const Scalars<T>& scalars, Math&, V& param,
                                 V grad, States& state) {
    const V update = update_buffer(variant, scalars, param, grad, state);
    if (variant.decay == Decay::kDecoupled) param = scalars.keep.times(param);
    param = fma(V(-scalars.lr), update, param);
  }

  // The grad becomes what the buffer is a sum of. Returns what the param moves along.
  template <class T, class V, class States>
  static FUSEDOPT_HD V update_buffer(Variant variant, const Scalars<T>& scalars, const V& param,
                                     V& grad, States& state) {
    grad = grad * V(scalars.grad_factor);
    if (variant.decay == Decay::kL2) grad = fma(V(scalars.weight_decay), param, grad);
    if (variant.momentum == Momentum::kNone) return grad;
    V& buffer = state[kMomentumBuffer];
    buffer = fma(V(scalars.momentum), buffer, V(scalars.grad_weight) * grad);
    if (variant.momentum == Momentum::kNesterov) return fma(V(scalars.momentum), buffer, grad);
    return buffer;
  }
};

}  // namespace fusedopt
