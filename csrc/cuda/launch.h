// What the driver passes to the runtime for one kernel launch, whatever the rule and the type that
// computes: which updates one launch can do together, and the arguments of the update kernel.
#pragma once

#include "cuda/grad_norm.h"
#include "cuda/step_scalars.h"
#include "cuda/update.h"

namespace fusedopt::cuda {

// What updates must have in common to be done by one launch: the kernel (rule, kind, and the type
// that computes, which follows from the formats) and all that StagePlan is made of.
struct LaunchKey {
  RuleId rule;
  KernelKind kind;
  Formats formats;
  uint32_t shifted;  // the misaligned operands, as in StagePlan

  friend bool operator==(const LaunchKey& a, const LaunchKey& b) {
    return a.rule == b.rule && a.kind == b.kind && a.shifted == b.shifted &&
           bit_cast<uint64_t>(a.formats) == bit_cast<uint64_t>(b.formats);
  }
};

inline LaunchKey launch_key_of(const ParamUpdate& update) {
  LaunchKey key = {update.rule, kPlainKernel, update.formats, shifted_operands(update)};
  with_rule(update.rule,
            [&](auto rule) { key.kind = kernel_kind<decltype(rule)>(update, key.shifted); });
  return key;
}

// Calls f(Rule{}, T{}): from a rule and a type known at run time to the types of a kernel.
template <class F>
void with_types(RuleId id, bool in_double, const F& f) {
  with_rule(id, [&](auto rule) {
    if (in_double)
      f(rule, double{});
    else
      f(rule, float{});
  });
}

// The same for the kernel of a launch.
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
  // In device memory, the part of the table that belongs to this launch.
  const ParamUpdate* updates;
  const ChunkStart* chunks;
  const Layout* layouts;
  // StepScalars of the launch's rule and type, indexed by ParamUpdate::scalars. nullptr: they are
  // few enough to be among the kernel's arguments.
  const void* scalars;
  const float* skip;
  int64_t num_chunks;  // one block each
  // On the host, of all launches. An update reads only its own, so it does no harm that those of
  // other rules mean nothing here.
  const Scalars* few_scalars;
  int64_t num_few_scalars;
};

struct SumSquaresCall {
  SumSquaresArguments arguments;
  int64_t num_leaves;
  bool in_double;  // the grads are float64
  void* stream;
};

// The kernel's arguments. The host's few scalars, computed in double, are converted to T here.
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
