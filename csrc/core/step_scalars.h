// The scalars of a step, computed in double from hyper-parameters and the number of the step: once
// for each (param group, step), never for an element. The device computes them where only it knows
// the step or the hyper-parameters, with the same text and the same bits.
#pragma once

#include <cstdint>

#include "core/ema.h"
#include "core/hyper.h"
#include "core/rules.h"
#include "core/stochastic.h"

namespace fusedopt {

// The scalars that all rules have.
template <class T>
struct CommonScalars {
  Ema<T> ema;
  uint32_t rounding_key;  // what all draws of this step start from (core/stochastic.h)
  uint32_t unused;

  template <class U>
  FUSEDOPT_HD CommonScalars<U> as() const {
    return {ema.template as<U>(), rounding_key, 0};
  }
};

// A rule's own scalars and the common ones, in the type that computes.
template <class Rule, class T>
struct StepScalars {
  typename Rule::template Scalars<T> rule;
  CommonScalars<T> common;

  template <class U>
  FUSEDOPT_HD StepScalars<Rule, U> as() const {
    return {rule.template as<U>(), common.template as<U>()};
  }
};

template <class Rule>
FUSEDOPT_HD StepScalars<Rule, double> step_scalars(const HyperParams& hyper, StepInfo info,
                                                   const GradInfo& grads) {
  const bool draws = hyper.stochastic_rounding != StochasticRounding::kNone;
  return {Rule::scalars(hyper, info, grads),
          {ema_at(hyper.ema_decay >= 0 ? ema_rate(hyper, info) : 0.0),
           draws ? rounding_key(hyper.rounding_seed, info.step) : 0u, 0u}};
}

// Scalars in double, of a rule that is known only at run time.
class Scalars {
 public:
  template <class Rule>
  FUSEDOPT_HD const StepScalars<Rule, double>& of() const {
    return *reinterpret_cast<const StepScalars<Rule, double>*>(bytes_);
  }
  template <class Rule>
  void set(const StepScalars<Rule, double>& scalars) {
    memcpy(bytes_, &scalars, sizeof(scalars));
  }

 private:
  template <class Rule>
  struct SizeOf : std::integral_constant<size_t, sizeof(StepScalars<Rule, double>)> {};
  alignas(double) unsigned char bytes_[Rules::kMaxSize<SizeOf>] = {};
};

}  // namespace fusedopt
