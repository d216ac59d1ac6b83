#pragma once

#include <cmath>

#include "core/factor.h"
#include "core/macros.h"
#include "core/rules/decay.h"

// Momentum SGD in torch.optim.SGD's form: v <- momentum v + (1 - dampening) g, p <- p - lr v, where
// lr scales the buffer when it is applied and not when it is filled. Nesterov as in Sutskever et
// al., "On the importance of initialization and momentum in deep learning" (2013). Weight decay as
// an L2 penalty, or decoupled (SGDW: Loshchilov and Hutter, arXiv 1711.05101).
namespace fusedopt {

template <class T>
struct SgdScalars {
  T grad_factor;  // -1 under maximize, times 1 / grad_scale
  T lr;
  T momentum;
  T grad_weight;   // 1 - dampening; 1 on a parameter's first step
  T weight_decay;  // the L2 penalty
  Factor<T> keep;  // what decoupled decay leaves, 1 - lr weight_decay

  template <class U>
  FUSEDOPT_HD SgdScalars<U> as() const {
    return {U(grad_factor), U(lr),           U(momentum),
            U(grad_weight), U(weight_decay), keep.template as<U>()};
  }
};

enum class Momentum { kNone, kHeavyBall, kNesterov };

// One element. Terms that torch skips are absent at compile time, so inf and NaN act as in torch.
template <class T, Momentum kMomentum, Decay kDecay>
struct Sgd {
  static constexpr int kNumStates = kMomentum == Momentum::kNone ? 0 : 1;
  SgdScalars<T> scalars;

  // Takes kMaxStates states, as every rule does; one that a variant lacks is left alone.
  FUSEDOPT_HD void operator()(T& param, T grad, T& momentum_buffer, T&, T&) const {
    grad *= scalars.grad_factor;
    if constexpr (kDecay == Decay::kL2) grad = std::fma(scalars.weight_decay, param, grad);
    if constexpr (kMomentum != Momentum::kNone) {
      momentum_buffer = std::fma(scalars.momentum, momentum_buffer, scalars.grad_weight * grad);
      grad = kMomentum == Momentum::kNesterov ? std::fma(scalars.momentum, momentum_buffer, grad)
                                              : momentum_buffer;
    }
    if constexpr (kDecay == Decay::kDecoupled) param = scalars.keep.times(param);
    param = std::fma(-scalars.lr, grad, param);
  }
};

// The rule as drivers see it: its variants by number, to be compiled one by one.
struct SgdFamily {
  template <class T>
  using Scalars = SgdScalars<T>;
  static constexpr int kMaxStates = 1;  // of a variant
  static constexpr int kNumVariants = 9;
  static constexpr int variant(Momentum momentum, Decay decay) {
    return static_cast<int>(momentum) * kNumDecays + static_cast<int>(decay);
  }
  template <class T, int kVariant>
  using Rule = Sgd<T, static_cast<Momentum>(kVariant / kNumDecays),
                   static_cast<Decay>(kVariant % kNumDecays)>;
};

}  // namespace fusedopt
