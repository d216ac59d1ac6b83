#pragma once

#include <cstdint>

#include "core/two_float.h"
#include "core/macros.h"

// What a step depends on beside its tensors.
namespace fusedopt {

// What is rounded stochastically, of what is stored in bfloat16 (core/stochastic.h).
enum class StochasticRounding : uint8_t {
  kSecondMoments,  // nearest would leave them standing still (README)
  kAll,
  kNone,
};

// Hyper-parameters of one param group, under torch's names; a rule reads those it has.
struct HyperParams {
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
  StochasticRounding stochastic_rounding = StochasticRounding::kNone;
  uint8_t unused[5] = {};  // see DeviceScalar in core/gpu.h

  bool has_ema() const { return ema_decay >= 0; }
};
static_assert(sizeof(HyperParams) == 9 * sizeof(double) + 16, "no bytes but those named");

// When a parameter is in its training.
struct StepInfo {
  uint64_t step;  // the number of this step, 1 for a parameter's first
  bool is_first;  // its state is new; torch fills a new momentum_buffer without dampening
};

// What a step knows of its grads: they are still multiplied by `scale`; `norm` is their global
// norm without that, if it is needed.
struct GradInfo {
  double scale = 1;
  double norm = 0;
};

// As torch.nn.utils.clip_grad_norm_ has it.
FUSEDOPT_HD double clip_factor(const HyperParams& hyper, double norm) {
  const double factor = hyper.max_grad_norm / (norm + 1e-6);
  return hyper.max_grad_norm > 0 && factor < 1.0 ? factor : 1.0;
}

FUSEDOPT_HD double grad_factor(const HyperParams& hyper, const GradInfo& grads) {
  return (hyper.maximize ? -1.0 : 1.0) * clip_factor(hyper, grads.norm) / grads.scale;
}

// A step with an lr of 0 changes no weight whatever the decay: torch.distributed.checkpoint makes
// such steps to have states created.
FUSEDOPT_HD TwoFloat<double> kept_by_decay(const HyperParams& hyper) {
  const bool is_independent = hyper.lr_independent_weight_decay && hyper.lr != 0;
  return two_float(1.0 - (is_independent ? 1.0 : hyper.lr) * hyper.weight_decay);
}

// What weight_decay does: nothing, add to the grad, or scale the param before the update.
enum class Decay { kNone, kL2, kDecoupled };
inline constexpr int kNumDecays = 3;

inline Decay decay_of(const HyperParams& hyper) {
  return hyper.weight_decay == 0        ? Decay::kNone
         : hyper.decoupled_weight_decay ? Decay::kDecoupled
                                        : Decay::kL2;
}

}  // namespace fusedopt
