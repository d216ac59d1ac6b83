// Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675).
#pragma once

#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Lion {
  enum State { kExpAvg, kNumStates };
  static constexpr bool is_second_moment(int) { return false; }
  static constexpr StateKind kind_of(int) { return StateKind::kSigned; }
  enum Own { kUpdateWeight, kUpdateFromGrad };  // a GradAverage with beta1

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    const GradAverage<double> update = grad_average(hyper.beta1);
    scalars.own[kUpdateWeight] = update.weight;
    scalars.own[kUpdateFromGrad] = update.to_grad;
    scalars.average = grad_average(hyper.beta2);
    return scalars;
  }

  using Variant = CautiousDecayVariant;
  static constexpr int kNumVariants = Variant::kNumbers;
  static Variant variant(const HyperParams& hyper) {
    return {{decay_of(hyper)}, caution_of(hyper)};
  }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& scalars, Math&, V& param,
                                 V grad, States& state) {
    grad = whole_grad(variant.decay, scalars, param, grad);
    V& exp_avg = state[kExpAvg];
    const GradAverage<T> average = {scalars.own[kUpdateWeight], scalars.own[kUpdateFromGrad]};
    const V direction = careful(variant.caution, average(exp_avg, grad), grad);
    const V update = with_sign_of(direction, V(scalars.step_size));
    param = decayed(variant.decay, variant.caution, scalars.decay, update, param);
    param = param - update;
    exp_avg = scalars.average(exp_avg, grad);
  }
};

}  // namespace fusedopt
