#pragma once

#include <cstdint>

#include "core/average.h"
#include "core/rules/adam.h"
#include "core/rules/sgd.h"

// The list of all update rules; drivers walk it and name none of them.
namespace fusedopt {

enum class RuleId : uint8_t { kSgd, kAdam };

// Per-step scalars of one (param group, step) that are the same for all rules.
template <class T>
struct CommonScalars {
  Average<T> average;
  uint32_t rounding_key;  // of stochastic rounding
  uint32_t unused;

  template <class U>
  FUSEDOPT_HD CommonScalars<U> as() const {
    return {average.template as<U>(), rounding_key, 0};
  }
};

// Those of a rule and the common ones, in the type that computes.
template <class Family, class T>
struct StepScalars {
  typename Family::template Scalars<T> rule;
  CommonScalars<T> common;

  template <class U>
  FUSEDOPT_HD StepScalars<Family, U> as() const {
    return {rule.template as<U>(), common.template as<U>()};
  }
};

// The same in double; which member is set follows the RuleId.
union Scalars {
  StepScalars<SgdFamily, double> sgd;
  StepScalars<AdamFamily, double> adam;
};

FUSEDOPT_HD const StepScalars<SgdFamily, double>& scalars_of(SgdFamily, const Scalars& all) {
  return all.sgd;
}
FUSEDOPT_HD const StepScalars<AdamFamily, double>& scalars_of(AdamFamily, const Scalars& all) {
  return all.adam;
}

inline void set_scalars(Scalars& all, const StepScalars<SgdFamily, double>& scalars) {
  all.sgd = scalars;
}
inline void set_scalars(Scalars& all, const StepScalars<AdamFamily, double>& scalars) {
  all.adam = scalars;
}

inline constexpr int kMaxStates = 3;

// Calls `f` with the rule family that `id` names. On the host: device code is compiled for each
// family.
template <class F>
inline __attribute__((always_inline)) decltype(auto) with_family(RuleId id, F&& f) {
  switch (id) {
    case RuleId::kSgd:
      return f(SgdFamily{});
    case RuleId::kAdam:
      break;
  }
  return f(AdamFamily{});
}

}  // namespace fusedopt
