// Rprop (Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: The
// RPROP algorithm", 1993), in torch's form.
#pragma once

#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

struct Rprop {
  enum State { kPrev, kStepSize, kNumStates };
  static constexpr bool is_second_moment(int) { return false; }
  static constexpr StateKind kind_of(int) { return StateKind::kExact; }
  enum Own { kEtaMinus, kEtaPlus, kSmallest, kLargest };

  static FUSEDOPT_HD SharedScalars<double> scalars(const HyperParams& hyper, StepInfo,
                                                   const GradInfo& grads) {
    SharedScalars<double> scalars = shared_scalars(hyper, grads);
    scalars.own[kEtaMinus] = hyper.eta_minus;
    scalars.own[kEtaPlus] = hyper.eta_plus;
    scalars.own[kSmallest] = hyper.smallest_step;
    scalars.own[kLargest] = hyper.largest_step;
    return scalars;
  }

  using Variant = OnlyVariant;
  static constexpr int kNumVariants = 1;
  static Variant variant(const HyperParams&) { return {}; }

  template <class T, class V, class Math, class States>
  static FUSEDOPT_HD void update(Variant, const SharedScalars<T>& scalars, Math&, V& param, V grad,
                                 States& state) {
    grad = grad * V(scalars.grad_factor);
    V &prev = state[kPrev], &size = state[kStepSize];
    // A NaN agrees with nothing and contradicts nothing, as torch.sign has it.
    const V agreement = grad * prev;
    V factor = select(agreement > V(0), V(scalars.own[kEtaPlus]), V(1));
    factor = select(agreement < V(0), V(scalars.own[kEtaMinus]), factor);
    size = size * factor;
    size = select(size < V(scalars.own[kSmallest]), V(scalars.own[kSmallest]), size);
    size = select(size > V(scalars.own[kLargest]), V(scalars.own[kLargest]), size);
    grad = select(agreement < V(0), V(0), grad);
    param = param - with_sign_of(grad, size);
    prev = grad;
  }
};

}  // namespace fusedopt
