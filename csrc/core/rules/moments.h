// Running averages of grads and of their squares, which several rules keep.
#pragma once

#include "core/lanes.h"
#include "core/macros.h"
#include "core/normal.h"
#include "core/two_float.h"

namespace fusedopt {

// decay m + (1 - decay) g, as m + (1 - decay) (g - m), which rounds less; or from the grad, if that
// is the nearer end.
template <class T>
struct GradAverage {
  T weight;   // 1 - decay, or -decay if the interpolation starts from the grad
  T to_grad;  // not 0 if it does

  template <class V>
  FUSEDOPT_HD V operator()(V average, V grad) const {
    if (to_grad != 0) return fma(V(weight), grad - average, grad);
    return fma(V(weight), grad - average, average);
  }

  template <class U>
  FUSEDOPT_HD GradAverage<U> as() const {
    return {U(weight), U(to_grad)};
  }
};

FUSEDOPT_HD GradAverage<double> grad_average(double decay) {
  return decay <= 0.5 ? GradAverage<double>{-decay, 1} : GradAverage<double>{1.0 - decay, 0};
}

// decay v + (1 - decay) g^2. It keeps the textbook form, as in torch: once it has overflowed it
// must stay infinite, where a difference would give NaN.
template <class T>
struct SquareAverage {
  TwoFloat<T> decay;
  TwoFloat<T> one_minus_decay;

  template <class V>
  FUSEDOPT_HD V operator()(V average, V grad) const {
    return fma(one_minus_decay.times(grad), grad, decay.times(average));
  }

  template <class U>
  FUSEDOPT_HD SquareAverage<U> as() const {
    return {decay.template as<U>(), one_minus_decay.template as<U>()};
  }
};

FUSEDOPT_HD SquareAverage<double> square_average(double decay) {
  return {two_float(decay), two_float(1.0 - decay)};
}

// A small number that keeps a denominator from being 0, in another type: above 0 it stays so.
template <class U, class T>
FUSEDOPT_HD U as_eps(T eps) {
  return eps > 0 && U(eps) < kSmallestNormal<U> ? kSmallestNormal<U> : U(eps);
}

// eps times a factor: what keeps the denominator from being 0 must not become 0 itself.
FUSEDOPT_HD double scaled_eps(double eps, double factor) {
  const double scaled = eps * factor;
  return is_positive(eps) && scaled < kSmallestNormal<double> ? kSmallestNormal<double> : scaled;
}

}  // namespace fusedopt
