// What a step depends on beside its tensors: hyper-parameters, the number of the step, and what is
// known of the grads.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/two_float.h"

namespace fusedopt {

// Which of the operands that are stored in bfloat16 are rounded stochastically (core/stochastic.h).
// With any but kNone, so are states that are codes, and weights of 24 bits.
enum class StochasticRounding : uint8_t {
  kSecondMoments,  // rounded to nearest, they would stand still (docs/numerics.md)
  kAll,
  kNone,
};

// Hyper-parameters of one param group, under torch's names. A rule reads those that it has.
struct HyperParams {
  double lr = 0;
  double weight_decay = 0;
  double momentum = 0;
  double dampening = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double alpha = 0;
  double rho = 0;
  double lr_decay = 0;
  double momentum_decay = 0;
  double lambd = 0;
  double t0 = 0;
  double eta_minus = 0, eta_plus = 0;          // etas
  double smallest_step = 0, largest_step = 0;  // step_sizes
  double max_grad_norm = 0;                    // 0: grads are not clipped
  double ema_decay = -1;                       // below 0: no moving average
  uint32_t rounding_seed = 0;
  bool maximize = false;
  bool nesterov = false;
  bool amsgrad = false;
  bool centered = false;
  bool decoupled_weight_decay = false;
  bool lr_independent_weight_decay = false;
  bool cautious_update = false;
  bool cautious_weight_decay = false;
  bool ema_bias_correction = false;
  StochasticRounding stochastic_rounding = StochasticRounding::kNone;
  uint8_t member = 0;      // which rule it is of those that share one's kernel (core/one_of.h)
  uint8_t unused[1] = {};  // in place of padding, as in DeviceScalar (core/gpu.h)

  bool has_ema() const { return ema_decay >= 0; }
};
static_assert(sizeof(HyperParams) == 19 * sizeof(double) + 16, "no bytes but those named");

// How far a parameter is in its training.
struct StepInfo {
  uint64_t step;  // the number of this step, 1 for a parameter's first
  bool is_first;  // its state is new; torch fills a new momentum_buffer without dampening
};

// What a step knows of its grads: they are still multiplied by `scale`, the scale of a GradScaler.
// `norm` is their global norm once divided by it, if clipping needs it.
struct GradInfo {
  double scale = 1;
  double norm = 0;
};

// What grads are multiplied by to clip them, as in torch.nn.utils.clip_grad_norm_.
FUSEDOPT_HD double clip_factor(const HyperParams& hyper, double norm) {
  const double factor = hyper.max_grad_norm / (norm + 1e-6);
  return hyper.max_grad_norm > 0 && factor < 1.0 ? factor : 1.0;
}

// What a step multiplies all grads by: the sign, clipping and unscaling as one factor.
FUSEDOPT_HD double grad_factor(const HyperParams& hyper, const GradInfo& grads) {
  return (hyper.maximize ? -1.0 : 1.0) * clip_factor(hyper, grads.norm) / grads.scale;
}

// What decoupled weight decay multiplies a weight by. A step with an lr of 0 must change no weight,
// even where the decay does not depend on lr: torch.distributed.checkpoint makes such steps to have
// the states created.
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
