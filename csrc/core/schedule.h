#pragma once

#include <cmath>
#include <cstdint>

#include "core/normal.h"
#include "core/power.h"
#include "core/rules.h"
#include "core/stochastic.h"

// The per-step scalars of each rule, computed in double from hyper-parameters and step: once for
// each distinct (param group, step), never for an element. Also done on the device, where only it
// knows the step or the hyper-parameters; the bits are the same.
namespace fusedopt {

// Hyper-parameters of one param group, under torch's names; a rule reads those it has.
struct Hyper {
  double lr = 0;
  double weight_decay = 0;
  double momentum = 0;
  double dampening = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double max_grad_norm = 0;  // 0: grads are not clipped
  double ema_decay = -1;     // below 0: no average
  uint32_t rounding_seed = 0;
  bool maximize = false;
  bool nesterov = false;
  bool amsgrad = false;
  bool decoupled_weight_decay = false;
  bool lr_independent_weight_decay = false;
  bool ema_bias_correction = false;
  bool stochastic_rounding = false;
  uint8_t unused[5] = {};  // see DeviceNumber in core/gpu.h

  bool has_ema() const { return ema_decay >= 0; }
};
static_assert(sizeof(Hyper) == 9 * sizeof(double) + 16, "no bytes but those named");

// When a parameter is in its training.
struct Time {
  uint64_t step;  // the number of this step, 1 for a parameter's first
  bool is_first;  // its state is new; torch fills a new momentum_buffer without dampening
};

// What a step knows of its grads: they are still multiplied by `scale`; `norm` is their global
// norm without that, if it is needed.
struct GradFacts {
  double scale = 1;
  double norm = 0;
};

// As torch.nn.utils.clip_grad_norm_ has it.
FUSEDOPT_HD double clip_factor(const Hyper& hyper, double norm) {
  const double factor = hyper.max_grad_norm / (norm + 1e-6);
  return hyper.max_grad_norm > 0 && factor < 1.0 ? factor : 1.0;
}

FUSEDOPT_HD double grad_factor(const Hyper& hyper, const GradFacts& grads) {
  return (hyper.maximize ? -1.0 : 1.0) * clip_factor(hyper, grads.norm) / grads.scale;
}

// A step with an lr of 0 changes no weight whatever the decay: torch.distributed.checkpoint makes
// such steps to have states created.
FUSEDOPT_HD Factor<double> kept_by_decay(const Hyper& hyper) {
  const bool is_independent = hyper.lr_independent_weight_decay && hyper.lr != 0;
  return split(1.0 - (is_independent ? 1.0 : hyper.lr) * hyper.weight_decay);
}

FUSEDOPT_HD SgdScalars<double> schedule_rule(SgdFamily, const Hyper& hyper, Time time,
                                             const GradFacts& grads) {
  return {grad_factor(hyper, grads),
          hyper.lr,
          hyper.momentum,
          time.is_first ? 1.0 : 1.0 - hyper.dampening,
          hyper.weight_decay,
          kept_by_decay(hyper)};
}

FUSEDOPT_HD AdamScalars<double> schedule_rule(AdamFamily, const Hyper& hyper, Time time,
                                              const GradFacts& grads) {
  const double correction1 = 1.0 - power(hyper.beta1, time.step);
  const double sqrt_correction2 = std::sqrt(1.0 - power(hyper.beta2, time.step));
  const bool to_grad = hyper.beta1 <= 0.5;
  // An eps that keeps the denominator from 0 must not become 0 itself (see also AdamScalars::as).
  double eps = hyper.eps * sqrt_correction2;
  if (is_positive(hyper.eps) && eps < kSmallestNormal<double>) eps = kSmallestNormal<double>;
  return {grad_factor(hyper, grads),
          to_grad ? -hyper.beta1 : 1.0 - hyper.beta1,
          to_grad ? 1.0 : 0.0,
          split(hyper.beta2),
          split(1.0 - hyper.beta2),
          hyper.lr * sqrt_correction2 / correction1,
          eps,
          hyper.weight_decay,
          kept_by_decay(hyper)};
}

// The bias correction makes the weights of all steps so far add up to 1. Without it the first step
// sets the average, as torch.optim.swa_utils.AveragedModel does.
FUSEDOPT_HD double average_rate(const Hyper& hyper, Time time) {
  const double rate = 1.0 - hyper.ema_decay;
  if (time.step <= 1) return 1.0;
  if (!hyper.ema_bias_correction) return rate;
  // With a decay of 1, all steps weigh the same.
  return rate > 0 ? rate / (1.0 - power(hyper.ema_decay, time.step))
                  : 1.0 / static_cast<double>(time.step);
}

template <class Family>
FUSEDOPT_HD StepScalars<Family, double> schedule(Family family, const Hyper& hyper, Time time,
                                                 const GradFacts& grads) {
  return {schedule_rule(family, hyper, time, grads),
          {average_at(hyper.ema_decay >= 0 ? average_rate(hyper, time) : 0.0),
           hyper.stochastic_rounding ? rounding_key(hyper.rounding_seed, time.step) : 0u, 0u}};
}

inline Decay decay(const Hyper& hyper) {
  return hyper.weight_decay == 0        ? Decay::kNone
         : hyper.decoupled_weight_decay ? Decay::kDecoupled
                                        : Decay::kL2;
}

inline int variant(SgdFamily, const Hyper& hyper) {
  const Momentum momentum = hyper.momentum == 0 ? Momentum::kNone
                            : hyper.nesterov    ? Momentum::kNesterov
                                                : Momentum::kHeavyBall;
  return SgdFamily::variant(momentum, decay(hyper));
}

inline int variant(AdamFamily, const Hyper& hyper) {
  return AdamFamily::variant(decay(hyper), hyper.amsgrad);
}

}  // namespace fusedopt
