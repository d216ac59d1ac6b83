// Lists of update rules, and what follows from a list.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

namespace fusedopt {

template <class... Rule>
struct RuleList {
  static constexpr int kSize = sizeof...(Rule);
  static constexpr int kMaxStates = std::max({int{Rule::kNumStates}...});
  template <template <class> class SizeOf>
  static constexpr size_t kMaxSize = std::max({SizeOf<Rule>::value...});

  // The number of a rule in the list; -1: it is not there.
  template <class Wanted>
  static constexpr int find() {
    int at = 0, found = -1;
    ((found = std::is_same_v<Rule, Wanted> ? at : found, ++at), ...);
    return found;
  }

  // Calls `f` with the rule of this number. Only on the host: each kernel is compiled for one rule.
  template <class F>
  static void call(int number, const F& f) {
    int at = 0;
    ((at++ == number ? f(Rule{}) : void()), ...);
  }
};

}  // namespace fusedopt
