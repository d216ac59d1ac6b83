// The exponential moving average of the weights (`ema_decay`), and its rate in each step.
#pragma once

#include "core/hyper.h"
#include "core/lanes.h"
#include "core/macros.h"
#include "core/power.h"

namespace fusedopt {

// ema + rate (weight - ema), computed from the nearer end, which rounds less. At a rate of 1 the
// result is the weight, exactly.
template <class T>
struct Ema {
  T factor;     // rate, or rate - 1 if the interpolation starts from the weight
  T to_weight;  // not 0 if it starts from the weight

  template <class V>
  FUSEDOPT_HD V operator()(V ema, V weight) const {
    const V from = either(to_weight != 0, weight, ema);
    return either(factor == 0, from, fma(V(factor), weight - ema, from));
  }

  template <class U>
  FUSEDOPT_HD Ema<U> as() const {
    return {U(factor), U(to_weight)};
  }
};

FUSEDOPT_HD Ema<double> ema_at(double rate) {
  return rate <= 0.5 ? Ema<double>{rate, 0} : Ema<double>{rate - 1, 1};
}

// The rate in this step. With bias correction, the factors of all weights so far add up to 1.
// Without it, the first step sets the average to the weight, as torch.optim.swa_utils.AveragedModel
// does, and later steps have a rate of 1 - ema_decay.
FUSEDOPT_HD double ema_rate(const HyperParams& hyper, StepInfo info) {
  const double rate = 1.0 - hyper.ema_decay;
  if (info.step <= 1) return 1.0;
  if (!hyper.ema_bias_correction) return rate;
  // With a decay of 1, the corrected average is the mean of all steps.
  return rate > 0 ? rate / (1.0 - power(hyper.ema_decay, info.step))
                  : 1.0 / static_cast<double>(info.step);
}

}  // namespace fusedopt
