// Adam and SGD with caution (core/rules/caution.h). They are rules of their own, so that the
// kernels of Adam and SGD do nothing for it.
#pragma once

#include "core/rules/adam.h"
#include "core/rules/caution.h"
#include "core/rules/sgd.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct CautiousAdam {
  static constexpr int kNumStates = Adam::kNumStates;
  static constexpr bool is_second_moment(int state) { return Adam::is_second_moment(state); }
  static constexpr StateKind kind_of(int state) { return Adam::kind_of(state); }

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    const Adam::Scalars<double> own = Adam::scalars(hyper, info, grads);
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.step_size = own.step_size;
    scalars.eps = own.eps;
    scalars.average = own.average;
    scalars.set(own.square_average);
    return scalars;
  }

  using Variant = CautiousVariant<Adam::Variant, Adam::kNumVariants>;
  static constexpr int kNumVariants = Variant::kNumbers;
  static Variant variant(const HyperParams& hyper) {
    return {Adam::variant(hyper), caution_of(hyper)};
  }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& shared, Math& math,
                                 V& param, V grad, States& state) {
    const Adam::Scalars<T> scalars = {shared.grad_factor, shared.average, shared.square_average(),
                                      shared.step_size,   shared.eps,     shared.decay.high,
                                      shared.decay};
    const V second_moment = Adam::update_moments(variant, scalars, param, grad, state);
    const V ratio = math.divide_by_root(state[Adam::kExpAvg], second_moment, V(scalars.eps));
    const V direction = careful(variant.caution, ratio, grad);
    param = decayed(variant.decay, variant.caution, scalars.keep,
                    signed_as(scalars.step_size, direction), param);
    param = fma(V(-scalars.step_size), direction, param);
  }
};

struct CautiousSgd {
  static constexpr int kNumStates = Sgd::kNumStates;
  static constexpr bool is_second_moment(int) { return false; }
  static constexpr StateKind kind_of(int state) { return Sgd::kind_of(state); }
  enum Own { kMomentum, kGradWeight };

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.own[kMomentum] = hyper.momentum;
    scalars.own[kGradWeight] = Sgd::scalars(hyper, info, grads).grad_weight;
    return scalars;
  }

  using Variant = CautiousVariant<Sgd::Variant, Sgd::kNumVariants>;
  static constexpr int kNumVariants = Variant::kNumbers;
  static Variant variant(const HyperParams& hyper) {
    return {Sgd::variant(hyper), caution_of(hyper)};
  }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant variant, const SharedScalars<T>& shared, Math&, V& param,
                                 V grad, States& state) {
    const Sgd::Scalars<T> scalars = {shared.grad_factor,    shared.step_size,
                                     shared.own[kMomentum], shared.own[kGradWeight],
                                     shared.decay.high,     shared.decay};
    const V found = Sgd::update_buffer(variant, scalars, param, grad, state);
    const V direction = careful(variant.caution, found, grad);
    param = decayed(variant.decay, variant.caution, scalars.keep, signed_as(scalars.lr, direction),
                    param);
    param = fma(V(-scalars.lr), direction, param);
  }
};

}  // namespace fusedopt
