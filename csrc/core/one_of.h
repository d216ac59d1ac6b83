// Several rules as one rule, which chooses among them at run time: kernels are compiled for it, and
// not for each of them, where the time to compile and the size of what comes out count for more.
// The choice is the same for all elements of an update, so it costs next to nothing.
#pragma once

#include "core/hyper.h"
#include "core/macros.h"
#include "core/rule_list.h"
#include "core/rules/shared_scalars.h"
#include "core/state_kind.h"

namespace fusedopt {

// Whether 8 bits do for states of a rule.
template <class Rule>
constexpr bool has_codes() {
  bool found = false;
  for (int s = 0; s < Rule::kNumStates; ++s) found = found || Rule::kind_of(s) != StateKind::kExact;
  return found;
}
template <class Rule>
inline constexpr bool kHasCodes = has_codes<Rule>();

// HyperParams::member says which of the rules a group is for: its number in the list. All of them
// have SharedScalars, and no `Scalars` of their own.
template <class... Rule>
struct OneOf {
  using Members = RuleList<Rule...>;

  static constexpr int kNumStates = Members::kMaxStates;
  static constexpr int kNumVariants = (Rule::kNumVariants + ...);
  template <class T>
  using Scalars = SharedScalars<T>;

  // A variant of one of the rules. They are numbered through: those of the first rule come first.
  class Variant {
   public:
    static FUSEDOPT_HD Variant of(int number) { return Variant(number); }
    FUSEDOPT_HD int number() const { return number_; }
    bool uses(int state) const {
      bool found = false;
      with_rule([&](auto rule, auto own) {
        found = state < decltype(rule)::kNumStates && own.uses(state);
      });
      return found;
    }

    // Calls f(rule, its variant) with the rule that this is a variant of.
    template <class F>
    FUSEDOPT_HD void with_rule(const F& f) const {
      int own = number_;  // the number within the rule that is visited, or beyond it
      const auto visit = [&](auto rule) __attribute__((always_inline)) {
        using Own = decltype(rule);
        const bool is_its = own < Own::kNumVariants;
        if (is_its) f(rule, Own::Variant::of(own));
        own -= Own::kNumVariants;
        return is_its;
      };
      (visit(Rule{}) || ...);
    }

   private:
    FUSEDOPT_HD explicit Variant(int number) : number_(number) {}
    int number_;
  };

  static Variant variant(const HyperParams& hyper) {
    int member = 0, first = 0, number = 0;
    ((number = member++ == hyper.member ? first + Rule::variant(hyper).number() : number,
      first += Rule::kNumVariants),
     ...);
    return Variant::of(number);
  }

  static FUSEDOPT_HD Scalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                             const GradInfo& grads) {
    int member = 0;
    Scalars<double> found = {};
    ((member++ == hyper.member ? void(found = Rule::scalars(hyper, info, grads)) : void()), ...);
    return found;
  }

  template <class T, class V, class Math>
  static FUSEDOPT_HD void update(Variant variant, const Scalars<T>& scalars, Math& math, V& param,
                                 const V& grad, V (&state)[kNumStates]) {
    variant.with_rule([&](auto rule, auto own) __attribute__((always_inline)) {
      if constexpr (!Math::kIsForCodes || kHasCodes<decltype(rule)>)
        decltype(rule)::update(own, scalars, math, param, grad, state);
    });
  }
};

}  // namespace fusedopt
