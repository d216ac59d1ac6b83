#pragma once

#include "cuda/measure.h"
#include "cuda/schedule.h"
#include "cuda/update.h"

// A launch as the driver asks for it, whatever the rule and the type that computes.
namespace fusedopt::cuda {

// What one kernel does.
struct Column {
  RuleId rule;
  bool in_double;
};

// Calls f(Rule{}, T{}) of a column.
template <class F>
void with_types(Column column, const F& f) {
  with_rule(column.rule, [&](auto rule) {
    if (column.in_double)
      f(rule, double{});
    else
      f(rule, float{});
  });
}

struct UpdateCall {
  Column column;
  void* stream;
  // In device memory.
  const Work* works;
  const ChunkStart* chunks;
  const Layout* layouts;
  const void* scalars;  // of the column's types, by Work::scalars, or nullptr: `few_scalars`
  const float* skip;
  int64_t num_chunks;
  int64_t warp_bytes;  // of shared memory
  // On the host. Those that works of other columns use are not read.
  const Scalars* few_scalars;
  int64_t num_few_scalars;
};

struct MeasureCall {
  MeasureArguments arguments;
  int64_t num_leaves;
  bool in_float, in_double;  // there are grads that are summed so
  void* stream;
};

template <class Rule, class T>
UpdateArguments<Rule, T> arguments_for(const UpdateCall& call) {
  using Arguments = UpdateArguments<Rule, T>;
  Arguments arguments = {call.works,
                         call.chunks,
                         call.layouts,
                         static_cast<const typename Arguments::WorkScalars*>(call.scalars),
                         call.skip,
                         static_cast<uint32_t>(call.warp_bytes),
                         {}};
  static_assert(sizeof(arguments) <= 4096, "more than a kernel's arguments may take");
  for (int64_t i = 0; i < call.num_few_scalars; ++i)
    arguments.few[i] = call.few_scalars[i].of<Rule>().template as<T>();
  return arguments;
}

}  // namespace fusedopt::cuda
