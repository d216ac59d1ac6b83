// NAdam (Dozat, "Incorporating Nesterov Momentum into Adam", 2016), in torch's form.
#pragma once

#include <cmath>

#include "core/power.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Nadam {
  enum State { kExpAvg, kExpAvgSq, kNumStates };
  static constexpr bool is_second_moment(int state) { return state == kExpAvgSq; }
  static constexpr StateKind kind_of(int state) {
    return state == kExpAvg ? StateKind::kSigned : StateKind::kPositive;
  }
  enum Own { kExpAvgWeight = kSquareAverageScalars };  // the grad's weight is the step_size

  // beta1 (1 - 0.96^(step momentum_decay) / 2), the momentum of a step.
  static FUSEDOPT_HD double momentum(const HyperParams& hyper, uint64_t step) {
    const double exponent = static_cast<double>(step) * hyper.momentum_decay;
    return hyper.beta1 * (1.0 - 0.5 * real_power(0.96, exponent));
  }

  // The product of the momenta of all steps up to this one. Below 1e-30, it counts as 0 beside 1.
  static FUSEDOPT_HD double momentum_product(const HyperParams& hyper, uint64_t step) {
    const double factor = real_power(0.96, hyper.momentum_decay);
    double product = 1, decay = 1;
    for (uint64_t i = 0; i < step; ++i) {
      decay *= factor;
      product *= hyper.beta1 * (1.0 - 0.5 * decay);
      if (std::fabs(product) < 1e-30) return 0;
    }
    return product;
  }

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    const double sqrt_correction2 = std::sqrt(1.0 - power(hyper.beta2, info.step));
    const double now = momentum(hyper, info.step), next = momentum(hyper, info.step + 1);
    const double product = momentum_product(hyper, info.step),
                 step_size = hyper.lr * sqrt_correction2;
    scalars.eps = scaled_eps(hyper.eps, sqrt_correction2);
    scalars.average = grad_average(hyper.beta1);
    scalars.set(square_average(hyper.beta2));
    scalars.step_size = step_size * (1.0 - now) / (1.0 - product);
    scalars.own[kExpAvgWeight] = step_size * next / (1.0 - product * next);
    return scalars;
  }

  using Variant = CautiousDecayVariant;
  static constexpr int kNumVariants = Variant::kNumbers;
  static Variant variant(const HyperParams& hyper) {
    return {{decay_of(hyper)}, caution_of(hyper)};
  }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math& math,
                                 V& param, V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    exp_avg = scalars.average(exp_avg, grad);
    exp_avg_sq = scalars.square_average()(exp_avg_sq, grad);
    const V numerator = fma(V(scalars.step_size), grad, V(scalars.own[kExpAvgWeight]) * exp_avg);
    const V found = math.divide_by_root(numerator, exp_avg_sq, V(scalars.eps));  // lr included
    const V update = careful(variant.caution, found, signed_as(scalars.step_size, grad));
    param = decayed(variant.decay, variant.caution, scalars.decay, update, param);
    param = param - update;
  }
};

}  // namespace fusedopt
