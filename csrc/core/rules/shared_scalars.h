// The scalars of rules that share a kernel (core/one_of.h): those that several of them have, and
// room for what a rule alone has. They are few, because they take a GPU's registers.
#pragma once

#include "core/hyper.h"
#include "core/macros.h"
#include "core/rules/caution.h"
#include "core/rules/moments.h"
#include "core/two_float.h"

namespace fusedopt {

// The places of SharedScalars::own that a SquareAverage takes: the first ones.
inline constexpr int kSquareAverageScalars = 4;

template <class T>
struct SharedScalars {
  T grad_factor;      // -1 under maximize, times clipping, over grad_scale
  TwoFloat<T> decay;  // the L2 penalty, or what decoupled decay leaves of a weight
  T step_size;
  T eps;
  GradAverage<T> average;
  T own[kSquareAverageScalars + 1];  // a SquareAverage, or the rule names the places; and one more

  FUSEDOPT_HD SquareAverage<T> square_average() const {
    return {{own[0], own[1]}, {own[2], own[3]}};
  }
  FUSEDOPT_HD void set(const SquareAverage<T>& average) {
    own[0] = average.decay.high;
    own[1] = average.decay.rest;
    own[2] = average.one_minus_decay.high;
    own[3] = average.one_minus_decay.rest;
  }

  template <class U>
  FUSEDOPT_HD SharedScalars<U> as() const {
    return {U(grad_factor),
            decay.template as<U>(),
            U(step_size),
            as_eps<U>(eps),
            average.template as<U>(),
            {U(own[0]), U(own[1]), U(own[2]), U(own[3]), U(own[4])}};
  }
};

// With what follows from the hyper-parameters alone. The others are the rule's to set.
FUSEDOPT_HD SharedScalars<double> shared_scalars(const HyperParams& hyper, const GradInfo& grads) {
  SharedScalars<double> scalars = {};
  scalars.grad_factor = grad_factor(hyper, grads);
  scalars.decay =
      hyper.decoupled_weight_decay ? kept_by_decay(hyper) : TwoFloat<double>{hyper.weight_decay, 0};
  scalars.step_size = hyper.lr;
  scalars.eps = scaled_eps(hyper.eps, 1);
  return scalars;
}

// The variants of a rule whose decay is all that may be left out.
struct DecayVariant {
  Decay decay;

  constexpr int number() const { return static_cast<int>(decay); }
  static FUSEDOPT_HD constexpr DecayVariant of(int number) { return {static_cast<Decay>(number)}; }
  constexpr bool uses(int) const { return true; }
};

using CautiousDecayVariant = CautiousVariant<DecayVariant, kNumDecays>;

// The variants of a rule that has one.
struct OnlyVariant {
  constexpr int number() const { return 0; }
  static FUSEDOPT_HD constexpr OnlyVariant of(int) { return {}; }
  constexpr bool uses(int) const { return true; }
};

// The grad as a rule sees it: clipped, with its sign and the L2 penalty.
template <class T, class V>
FUSEDOPT_HD V whole_grad(Decay decay, const SharedScalars<T>& scalars, const V& param, V grad) {
  grad = grad * V(scalars.grad_factor);
  return decay == Decay::kL2 ? fma(V(scalars.decay.high), param, grad) : grad;
}

// The param after decoupled decay.
template <class T, class V>
FUSEDOPT_HD V decayed(Decay decay, const SharedScalars<T>& scalars, V param) {
  return decay == Decay::kDecoupled ? scalars.decay.times(param) : param;
}

}  // namespace fusedopt
