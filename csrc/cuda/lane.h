#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/macros.h"

// What all ways to update elements have in common.
namespace fusedopt::cuda {

// A thread among those that share a piece of a work.
struct Lane {
  uint32_t index;
  uint32_t count;
};

// Of numbers that are not negative; `is_small`: they fit 31 bits. A division of 64 bits takes much
// longer.
FUSEDOPT_HD int64_t divide(int64_t number, int64_t divisor, bool is_small) {
  if (is_small) return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  return number / divisor;
}

// Values of an element; states that a rule lacks are not touched.
template <class Rule, class T, int kSize>
FUSEDOPT_HD void apply(const Rule& rule, T (&values)[kSize], T (&unused)[kMaxOperands]) {
  constexpr int kStates = Rule::kNumStates;
  rule(values[kParam], values[kGrad], kStates > 0 ? values[kFirstState % kSize] : unused[0],
       kStates > 1 ? values[(kFirstState + 1) % kSize] : unused[1],
       kStates > 2 ? values[(kFirstState + 2) % kSize] : unused[2]);
}

// The same number, of which the compiler does not know that it is: it then computes addresses
// again for the stores, where keeping those of the loads would take dozens of registers.
FUSEDOPT_HD uint32_t as_if_new(uint32_t number) {
  asm("" : "+r"(number));
  return number;
}

}  // namespace fusedopt::cuda
