#pragma once

#include <cmath>
#include <cstdint>

#include "core/power.h"
#include "core/rules.h"

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
  bool maximize = false;
  bool nesterov = false;
  bool amsgrad = false;
  bool decoupled_weight_decay = false;
  uint8_t unused[4] = {};  // see DeviceNumber in core/gpu.h
};

// When a parameter is in its training.
struct Time {
  uint64_t step;  // the number of this step, 1 for a parameter's first
  bool is_first;  // its state is new; torch fills a new momentum_buffer without dampening
};

FUSEDOPT_HD double grad_factor(const Hyper& hyper, double grad_scale) {
  return (hyper.maximize ? -1.0 : 1.0) / grad_scale;
}

FUSEDOPT_HD SgdScalars<double> schedule(SgdFamily, const Hyper& hyper, Time time,
                                        double grad_scale) {
  return {grad_factor(hyper, grad_scale), hyper.lr, hyper.momentum,
          time.is_first ? 1.0 : 1.0 - hyper.dampening, hyper.weight_decay};
}

FUSEDOPT_HD AdamScalars<double> schedule(AdamFamily, const Hyper& hyper, Time time,
                                         double grad_scale) {
  const double correction1 = 1.0 - power(hyper.beta1, time.step);
  const double sqrt_correction2 = std::sqrt(1.0 - power(hyper.beta2, time.step));
  const bool to_grad = hyper.beta1 <= 0.5;
  return {grad_factor(hyper, grad_scale),
          to_grad ? -hyper.beta1 : 1.0 - hyper.beta1,
          to_grad ? 1.0 : 0.0,
          split(hyper.beta2),
          split(1.0 - hyper.beta2),
          hyper.lr * sqrt_correction2 / correction1,
          hyper.eps * sqrt_correction2,
          hyper.weight_decay,
          split(1.0 - hyper.lr * hyper.weight_decay)};
}

inline int variant(SgdFamily, const Hyper& hyper) {
  const Momentum momentum = hyper.momentum == 0 ? Momentum::kNone
                            : hyper.nesterov    ? Momentum::kNesterov
                                                : Momentum::kHeavyBall;
  return SgdFamily::variant(momentum, hyper.weight_decay != 0);
}

inline int variant(AdamFamily, const Hyper& hyper) {
  const Decay decay = hyper.weight_decay == 0        ? Decay::kNone
                      : hyper.decoupled_weight_decay ? Decay::kDecoupled
                                                     : Decay::kL2;
  return AdamFamily::variant(decay, hyper.amsgrad);
}

}  // namespace fusedopt
