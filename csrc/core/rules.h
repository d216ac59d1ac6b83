// The lists of all update rules. All else follows from them, and drivers name no rule.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/one_of.h"
#include "core/rule_list.h"
#include "core/rules/adadelta.h"
#include "core/rules/adagrad.h"
#include "core/rules/adam.h"
#include "core/rules/adamax.h"
#include "core/rules/asgd.h"
#include "core/rules/cautious.h"
#include "core/rules/lion.h"
#include "core/rules/nadam.h"
#include "core/rules/radam.h"
#include "core/rules/rmsprop.h"
#include "core/rules/rprop.h"
#include "core/rules/sgd.h"
#include "core/rules/sparse_adam.h"

namespace fusedopt {

// Those with a kernel of their own, and one that stands for all others.
using OtherRules = OneOf<Adadelta, Adagrad, Adamax, Asgd, CautiousAdam, CautiousSgd, Lion, Nadam,
                         Radam, Rmsprop, Rprop, SparseAdam>;
using Rules = RuleList<Sgd, Adam, OtherRules>;
static_assert(OtherRules::kNumVariants <= 256, "a variant's number is kept in a byte");

// A rule's number: its place in the list, or that of the rule that stands for it.
using RuleId = uint8_t;
template <class Rule>
inline constexpr RuleId kIdOf =
    static_cast<RuleId>(Rules::find<Rule>() >= 0 ? Rules::find<Rule>() : Rules::find<OtherRules>());
// HyperParams::member of its groups.
template <class Rule>
inline constexpr uint8_t kMemberOf =
    static_cast<uint8_t>(std::max(OtherRules::Members::find<Rule>(), 0));

inline constexpr int kMaxStates = Rules::kMaxStates;

// Calls `f` with the rule of this id.
template <class F>
void with_rule(RuleId id, const F& f) {
  Rules::call(id, f);
}

}  // namespace fusedopt
