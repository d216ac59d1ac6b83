// Steps that go only where two directions agree, as an option of the rules with decoupled decay:
// cautious updates (Liang et al., "Cautious Optimizers", arXiv 2411.16085) and cautious weight
// decay (Chen et al., "Cautious Weight Decay", arXiv 2510.12402).
#pragma once

#include "core/hyper.h"
#include "core/lanes.h"
#include "core/macros.h"
#include "core/two_float.h"

namespace fusedopt {

struct Caution {
  bool in_updates;
  bool in_decay;  // of decoupled decay; no effect on the others

  static constexpr int kNumbers = 4;
  constexpr int number() const { return (in_updates ? 2 : 0) + (in_decay ? 1 : 0); }
  static FUSEDOPT_HD constexpr Caution of(int number) { return {number / 2 != 0, number % 2 != 0}; }
};

inline Caution caution_of(const HyperParams& hyper) {
  return {hyper.cautious_update, hyper.cautious_weight_decay};
}

// The variants of a rule that may be cautious: those it has otherwise, each with any caution.
template <class Plain, int kNumPlain>
struct CautiousVariant : Plain {
  Caution caution;

  static constexpr int kNumbers = kNumPlain * Caution::kNumbers;
  constexpr int number() const { return Plain::number() * Caution::kNumbers + caution.number(); }
  static FUSEDOPT_HD constexpr CautiousVariant of(int number) {
    return {Plain::of(number / Caution::kNumbers), Caution::of(number % Caution::kNumbers)};
  }
};

// `size` with the sign of `direction`, or the other sign; 0 for a direction of 0 or NaN, as
// torch.sign has it.
template <class V>
FUSEDOPT_HD V with_sign_of(const V& direction, const V& size) {
  return select(direction > V(0), size, select(direction < V(0), V(0) - size, V(0)));
}

// A direction with the sign that a step along it has: an lr below 0 turns it round.
template <class T, class V>
FUSEDOPT_HD V signed_as(T step_size, const V& direction) {
  return step_size < 0 ? V(0) - direction : direction;
}

// The direction that a rule has found, or 0 where it goes against the grad; NaN stays NaN.
template <class V>
FUSEDOPT_HD V careful(Caution caution, const V& direction, const V& grad) {
  if (!caution.in_updates) return direction;
  const V rest = select(direction != direction, direction, V(0));
  return select(with_sign_of(grad, direction) > V(0), direction, rest);
}

// The param after decoupled decay, which leaves `keep` of it. Cautious decay leaves it alone where
// the update, which is subtracted, takes it away from 0. Signs are compared and not the sign of a
// product: that may underflow.
template <class T, class V>
FUSEDOPT_HD V decayed(Decay decay, Caution caution, const TwoFloat<T>& keep, const V& update,
                      const V& param) {
  if (decay != Decay::kDecoupled) return param;
  const V all = keep.times(param);
  return caution.in_decay ? select(with_sign_of(update, param) < V(0), param, all) : all;
}

}  // namespace fusedopt
