#pragma once

#include "cuda/schedule.h"
#include "cuda/update.h"

// A launch as the driver asks for it, whatever the rule and the format.
namespace fusedopt::cuda {

inline bool in_double(int column) {
  return column == static_cast<int>(DType::kFloat64) || column == kMixedDouble;
}

struct UpdateCall {
  RuleId rule;
  int column;
  void* stream;
  // In device memory.
  const Work* works;
  const ChunkStart* chunks;
  const Layout* layouts;
  const void* scalars;  // in the column's type, by Work::scalars, or nullptr: `few_scalars`
  const float* found_inf;
  int64_t num_chunks;
  // On the host.
  const Scalars* few_scalars;
  int64_t num_few_scalars;
};

template <class Family, class T>
UpdateArguments<Family, T> arguments_for(const UpdateCall& call) {
  using Arguments = UpdateArguments<Family, T>;
  Arguments arguments = {
      call.works,     call.chunks,
      call.layouts,   static_cast<const typename Arguments::RuleScalars*>(call.scalars),
      call.found_inf, {}};
  static_assert(sizeof(arguments) <= 4096, "more than a kernel's arguments may take");
  for (int64_t i = 0; i < call.num_few_scalars; ++i)
    arguments.few[i] = scalars_of(Family{}, call.few_scalars[i]).template as<T>();
  return arguments;
}

}  // namespace fusedopt::cuda
