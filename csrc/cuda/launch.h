#pragma once

#include "cuda/grad_norm.h"
#include "cuda/step_scalars.h"
#include "cuda/update.h"

// A launch as the driver asks for it, whatever the rule and the type that computes.
namespace fusedopt::cuda {

// What works have in common that one launch can do.
struct LaunchKey {
  RuleId rule;
  Formats formats;
  uint32_t shifted;  // as in StagePlan

  friend bool operator==(const LaunchKey& a, const LaunchKey& b) {
    return a.rule == b.rule && a.shifted == b.shifted &&
           bit_cast<uint64_t>(a.formats) == bit_cast<uint64_t>(b.formats);
  }
};

inline LaunchKey launch_key_of(const ParamUpdate& update) {
  return {update.rule, update.formats, shifted_operands(update)};
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
void with_types(const LaunchKey& key, const F& f) {
  with_types(key.rule, key.formats.in_double(), f);
}

inline StagePlan plan_stages(const LaunchKey& key) {
  return key.formats.in_double() ? plan_stages<double>(key.formats, key.shifted)
                                 : plan_stages<float>(key.formats, key.shifted);
}

struct UpdateCall {
  LaunchKey key;
  void* stream;
  // In device memory.
  const ParamUpdate* updates;
  const ChunkStart* chunks;
  const Layout* layouts;
  const void* scalars;  // of the column's types, by ParamUpdate::scalars, or nullptr: `few_scalars`
  const float* skip;
  int64_t num_chunks;
  // On the host. Those that works of other columns use are not read.
  const Scalars* few_scalars;
  int64_t num_few_scalars;
};

struct SumSquaresCall {
  SumSquaresArguments arguments;
  int64_t num_leaves;
  bool in_float, in_double;  // there are grads that are summed so
  void* stream;
};

template <class Rule, class T>
UpdateArguments<Rule, T> arguments_for(const UpdateCall& call) {
  using Arguments = UpdateArguments<Rule, T>;
  Arguments arguments = {call.updates,
                         call.chunks,
                         call.layouts,
                         static_cast<const typename Arguments::UpdateScalars*>(call.scalars),
                         call.skip,
                         plan_stages(call.key),
                         {}};
  static_assert(sizeof(arguments) <= 4096, "more than a kernel's arguments may take");
  for (int64_t i = 0; i < call.num_few_scalars; ++i)
    arguments.few[i] = call.few_scalars[i].of<Rule>().template as<T>();
  return arguments;
}

}  // namespace fusedopt::cuda
