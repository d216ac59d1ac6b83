#pragma once

#include "cuda/measure.h"
#include "cuda/schedule.h"
#include "cuda/update.h"

// A launch as the driver asks for it, whatever the rule and the format.
namespace fusedopt::cuda {

inline bool in_double(int column) {
  return column == static_cast<int>(DType::kFloat64) || column == kMixedDouble;
}

// Calls `f` with the format of a column, as a Type.
template <class T>
struct Type {
  using Name = T;
};
template <class F>
decltype(auto) with_format(int column, F&& f) {
  switch (column) {
    case static_cast<int>(DType::kFloat32):
      return f(Type<Uniform<float>>{});
    case static_cast<int>(DType::kFloat64):
      return f(Type<Uniform<double>>{});
    case static_cast<int>(DType::kBFloat16):
      return f(Type<Uniform<BFloat16>>{});
    case static_cast<int>(DType::kFloat16):
      return f(Type<Uniform<Float16>>{});
    case kMixedFloat:
      return f(Type<Mixed<float>>{});
    default:
      return f(Type<Mixed<double>>{});
  }
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
  const float* skip;
  int64_t num_chunks;
  // On the host.
  const Scalars* few_scalars;
  int64_t num_few_scalars;
};

struct MeasureCall {
  MeasureArguments arguments;
  int64_t num_leaves;
  bool in_float, in_double;  // there are grads that are summed so
  void* stream;
};

template <class Family, class T>
UpdateArguments<Family, T> arguments_for(const UpdateCall& call) {
  using Arguments = UpdateArguments<Family, T>;
  Arguments arguments = {
      call.works,   call.chunks,
      call.layouts, static_cast<const typename Arguments::WorkScalars*>(call.scalars),
      call.skip,    {}};
  static_assert(sizeof(arguments) <= 4096, "more than a kernel's arguments may take");
  for (int64_t i = 0; i < call.num_few_scalars; ++i)
    arguments.few[i] = scalars_of(Family{}, call.few_scalars[i]).template as<T>();
  return arguments;
}

}  // namespace fusedopt::cuda
