// Several rules as one, which chooses among them at run time: kernels are compiled for it, and not
// for each of them, where the time to compile and the size of what comes out count for more. The
// choice is the same for all elements of an update, so it costs next to nothing.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/hyper.h"
#include "core/macros.h"
#include "core/rules/shared_scalars.h"

namespace fusedopt {

// Variants are numbered through all rules. HyperParams::member says which rule a group is for. The
// rules have SharedScalars, and no `Scalars` of their own.
template <class... Rule>
struct OneOf {
  static constexpr int kNumStates = std::max({int{Rule::kNumStates}...});
  static constexpr int kNumVariants = (Rule::kNumVariants + ...);
  template <class T>
  using Scalars = SharedScalars<T>;

  // The number of a rule among these; -1: it is none of them.
  template <class Wanted>
  static constexpr int find() {
    int at = 0, found = -1;
    ((found = std::is_same_v<Rule, Wanted> ? at : found, ++at), ...);
    return found;
  }

  // Calls f(rule, its number, the number of its first variant) for each rule, until f is true.
  template <class F>
  static FUSEDOPT_HD void find_if(const F& f) {
    int member = 0, first = 0;
    const auto visit = [&](auto rule) __attribute__((always_inline)) {
      const bool found = f(rule, member++, first);
      first += decltype(rule)::kNumVariants;
      return found;
    };
    (visit(Rule{}) || ...);
  }

  class Variant {
   public:
    static FUSEDOPT_HD Variant of(int number) { return Variant(number); }
    FUSEDOPT_HD int number() const { return number_; }
    bool uses(int state) const {
      bool found = false;
      for_rule([&](auto, auto own, int) { found = own.uses(state); });
      return found;
    }
    int member() const {
      int found = 0;
      for_rule([&](auto, auto, int member) { found = member; });
      return found;
    }

    // Calls f(rule, its variant, its number) for the rule that this is a variant of.
    template <class F>
    FUSEDOPT_HD void for_rule(const F& f) const {
      find_if([&](auto rule, int member, int first) __attribute__((always_inline)) {
        using Own = decltype(rule);
        const bool is_its = number_ < first + Own::kNumVariants;
        if (is_its) f(rule, Own::Variant::of(number_ - first), member);
        return is_its;
      });
    }

   private:
    FUSEDOPT_HD explicit Variant(int number) : number_(number) {}
    int number_;
  };

  static Variant variant(const HyperParams& hyper) {
    int number = 0;
    find_if([&](auto rule, int member, int first) {
      if (member == hyper.member) number = first + rule.variant(hyper).number();
      return member == hyper.member;
    });
    return Variant::of(number);
  }

  static FUSEDOPT_HD Scalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                             const GradInfo& grads) {
    Scalars<double> found = {};
    find_if([&](auto rule, int member, int) {
      if (member == hyper.member) found = decltype(rule)::scalars(hyper, info, grads);
      return member == hyper.member;
    });
    return found;
  }

  template <class T, class V, class Math>
  static FUSEDOPT_HD void update(Variant variant, const Scalars<T>& scalars, Math& math, V& param,
                                 const V& grad, V (&state)[kNumStates]) {
    variant.for_rule([&](auto rule, auto own, int) __attribute__((always_inline)) {
      decltype(rule)::update(own, scalars, math, param, grad, state);
    });
  }
};

}  // namespace fusedopt
