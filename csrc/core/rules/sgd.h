#pragma once

#include <cmath>

#include "core/macros.h"

// Momentum SGD in torch.optim.SGD's form: v <- momentum v + (1 - dampening) g, p <- p - lr v, where
// lr scales the buffer when it is applied and not when it is filled. Nesterov as in Sutskever et
// al., "On the importance of initialization and momentum in deep learning" (2013).
namespace fusedopt {

template <class T>
struct SgdScalars {
  T grad_factor;  // -1 under maximize, times 1 / grad_scale
  T lr;
  T momentum;
  T grad_weight;  // 1 - dampening; 1 on a parameter's first step
  T weight_decay;

  template <class U>
  FUSEDOPT_HD SgdScalars<U> as() const {
    return {U(grad_factor), U(lr), U(momentum), U(grad_weight), U(weight_decay)};
  }
};

enum class Momentum { kNone, kHeavyBall, kNesterov };

// One element. Terms that torch skips are absent at compile time, so inf and NaN act as in torch.
template <class T, Momentum kMomentum, bool kDecay>
struct Sgd {
  static constexpr int kNumStates = kMomentum == Momentum::kNone ? 0 : 1;
  SgdScalars<T> scalars;

  // Takes kMaxStates states, as every rule does; one that a variant lacks is left alone.
  FUSEDOPT_HD void operator()(T& param, T grad, T& momentum_buffer, T&, T&) const {
    grad *= scalars.grad_factor;
    if constexpr (kDecay) grad = std::fma(scalars.weight_decay, param, grad);
    if constexpr (kMomentum != Momentum::kNone) {
      momentum_buffer = std::fma(scalars.momentum, momentum_buffer, scalars.grad_weight * grad);
      grad = kMomentum == Momentum::kNesterov ? std::fma(scalars.momentum, momentum_buffer, grad)
                                              : momentum_buffer;
    }
    param = std::fma(-scalars.lr, grad, param);
  }
};

// The rule as drivers see it: its variants by number, to be compiled one by one.
struct SgdFamily {
  static constexpr int kNumVariants = 6;
  static constexpr int variant(Momentum momentum, bool decay) {
    return static_cast<int>(momentum) * 2 + (decay ? 1 : 0);
  }
  template <class T, int kVariant>
  using Rule = Sgd<T, static_cast<Momentum>(kVariant / 2), kVariant % 2 != 0>;
};

}  // namespace fusedopt
