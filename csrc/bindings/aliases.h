// Finds memory that one step would write twice, or read for one element and write for another.
#pragma once

#include <string>
#include <vector>

#include "bindings/param_table.h"
#include "bindings/step_call.h"

namespace fusedopt {

class AliasCheck {
 public:
  explicit AliasCheck(ParamTable& table) : table_(table) {}

  // Raises ValueError if the step would write some memory twice. Parameters that rest this time are
  // looked at, too, if they have been before, so that the answer stands when their turn comes.
  void refuse_overlap(const StepContext& context);

  // Compares the grads' memory with what the step writes, unless that has been done for the same
  // memory before. Returns true if a grad is written to as another parameter's, so that the order
  // of the parameters counts. Raises ValueError if an element is written to before another has read
  // it.
  bool check_grads(const StepContext& context);

  // How often all written memory has been compared so far, which takes long for sliced tensors.
  int64_t num_checks() const { return num_checks_; }
  size_t bytes() const { return written_.capacity() * sizeof(Written); }

 private:
  // An operand that a step writes, as owner of a Region.
  struct Written {
    uint32_t owner : 31;
    uint32_t starts_chain : 1;  // it begins behind the ends of all that begin before it
  };

  Region region_of(size_t at, int operand) const;
  std::string name_of(const StepContext& context, int64_t owner) const;
  bool meets_written(const Region& region, size_t& guess) const;
  bool reads_others(const StepContext& context, size_t at);

  ParamTable& table_;
  std::vector<Written> written_;  // all operands that are written, by address, as refuse_overlap()
                                  // left it; it stands while the table is disjoint
  int64_t num_checks_ = 0;
};

}  // namespace fusedopt
