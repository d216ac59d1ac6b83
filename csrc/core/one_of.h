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

  // Calls f(rule, its number, the number of its first variant) for each rule.
  template <class F>
  static FUSEDOPT_HD void for_each(const F& f) {
    int member = 0, first = 0;
    ((f(Rule{}, member++, first), first += Rule::kNumVariants), ...);
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
      for_each([&](auto rule, int member, int first) __attribute__((always_inline)) {
        using Own = decltype(rule);
        if (number_ >= first && number_ < first + Own::kNumVariants)
          f(rule, Own::Variant::of(number_ - first), member);
      });
    }

   private:
    FUSEDOPT_HD explicit Variant(int number) : number_(number) {}
    int number_;
  };

  static Variant variant(const HyperParams& hyper) {
    int number = 0;
    for_each([&](auto rule, int member, int first) {
      if (member == hyper.member) number = first + rule.variant(hyper).number();
    });
    return Variant::of(number);
  }

  static FUSEDOPT_HD Scalars<double> scalars(const HyperParams& hyper, StepInfo info,
                                             const GradInfo& grads) {
    Scalars<double> found = {};
    for_each([&](auto rule, int member, int) {
      if (member == hyper.member) found = decltype(rule)::scalars(hyper, info, grads);
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
