#pragma once

#include "cuda/measure.h"
#include "cuda/schedule.h"
#include "cuda/update.h"

// A launch as the driver asks for it, whatever the rule and the type that computes.
namespace fusedopt::cuda {

// What works have in common that one launch can do.
struct Column {
  RuleId rule;
  Formats formats;
  uint32_t shifted;  // as in StagePlan

  friend bool operator==(const Column& a, const Column& b) {
    return a.rule == b.rule && a.shifted == b.shifted &&
           bit_cast<uint64_t>(a.formats) == bit_cast<uint64_t>(b.formats);
  }
};

inline Column column_of(const Work& work) {
  return {work.rule, work.formats, shifted_operands(work)};
}

// Calls f(Rule{}, T{}).
template <class F>
void with_types(RuleId id, bool in_double, const F& f) {
  with_rule(id, [&](auto rule) {
    if (in_double)
      f(rule, double{});
    else
      f(rule, float{});
  });
}

// Calls f(Rule{}, T{}) of a column.
template <class F>
void with_types(const Column& column, const F& f) {
  with_types(column.rule, column.formats.in_double(), f);
}

inline StagePlan plan_stages(const Column& column) {
  return column.formats.in_double() ? plan_stages<double>(column.formats, column.shifted)
                                    : plan_stages<float>(column.formats, column.shifted);
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
                         plan_stages(call.column),
                         {}};
  static_assert(sizeof(arguments) <= 4096, "more than a kernel's arguments may take");
  for (int64_t i = 0; i < call.num_few_scalars; ++i)
    arguments.few[i] = call.few_scalars[i].of<Rule>().template as<T>();
  return arguments;
}

}  // namespace fusedopt::cuda
