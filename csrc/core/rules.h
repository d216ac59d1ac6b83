#pragma once

#include <cstdint>

#include "core/rules/adam.h"
#include "core/rules/sgd.h"

// The list of all update rules; drivers walk it and name none of them.
namespace fusedopt {

enum class RuleId : uint8_t { kSgd, kAdam };

// Per-step scalars of one (param group, step), in double; which member is set follows the RuleId.
union Scalars {
  SgdScalars<double> sgd;
  AdamScalars<double> adam;
};

FUSEDOPT_HD const SgdScalars<double>& scalars_of(SgdFamily, const Scalars& all) { return all.sgd; }
FUSEDOPT_HD const AdamScalars<double>& scalars_of(AdamFamily, const Scalars& all) {
  return all.adam;
}

inline void set_scalars(Scalars& all, const SgdScalars<double>& scalars) { all.sgd = scalars; }
inline void set_scalars(Scalars& all, const AdamScalars<double>& scalars) { all.adam = scalars; }

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
