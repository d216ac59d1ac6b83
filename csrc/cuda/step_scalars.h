// What one thread of the step-scalars kernel does: it advances the step count of one parameter and
// computes the scalars of its update. The kernel runs before the update where the host cannot do
// this, because only the device knows the step, the hyper-parameters or whether the step is to be
// skipped. The formulas are those of core/step_scalars.h, and the bits are the same.
#pragma once

#include <cstdint>

#include "core/gpu.h"
#include "core/step_scalars.h"

namespace fusedopt::cuda {

// All pointers are into device memory. Row r of the counters belongs to row r of the updates. The
// rows are those of one launch, so all scalars are of its rule and type.
struct StepScalarsArguments {
  const StepCounter* counters;
  const HyperParamsRef* groups;
  void* scalars;
  const float* grad_scale;  // or nullptr: then it is the host's
  double host_grad_scale;
  const float* skip;
  const double* grad_norm;  // nullptr: the grads are not read before the step
  int64_t num_rows;
  bool in_double;
};

// A hyper-parameter: from the device's tensor if there is one, else as the host gave it.
FUSEDOPT_HD double scalar_of(const DeviceScalar& number, double otherwise) {
  if (number.data == nullptr) return otherwise;
  if (number.dtype == DType::kFloat64) return *static_cast<const double*>(number.data);
  return static_cast<double>(*static_cast<const float*>(number.data));
}

// The hyper-parameters of a group, with those that are tensors on the device read there.
FUSEDOPT_HD HyperParams hyper_of(const HyperParamsRef& source) {
  HyperParams hyper = source.values;
  hyper.lr = scalar_of(source.lr, hyper.lr);
  hyper.weight_decay = scalar_of(source.weight_decay, hyper.weight_decay);
  hyper.momentum = scalar_of(source.momentum, hyper.momentum);
  hyper.dampening = scalar_of(source.dampening, hyper.dampening);
  hyper.beta1 = scalar_of(source.beta1, hyper.beta1);
  hyper.beta2 = scalar_of(source.beta2, hyper.beta2);
  hyper.eps = scalar_of(source.eps, hyper.eps);
  return hyper;
}

// Adds 1 to the step count, in the format in which it is kept, and returns what it has become. A
// count in float no longer grows at 2^24, as in torch.
FUSEDOPT_HD StepInfo increment(const StepCounter& counter) {
  if (counter.step == nullptr) return {0, counter.is_first};
  const bool is_double = counter.dtype == DType::kFloat64;
  const double done =
      is_double ? *static_cast<double*>(counter.step) : double{*static_cast<float*>(counter.step)};
  const double step = done + 1;
  if (is_double)
    *static_cast<double*>(counter.step) = step;
  else
    *static_cast<float*>(counter.step) = static_cast<float>(step);
  return {static_cast<uint64_t>(step), counter.is_first || (counter.is_fresh && done == 0)};
}

// A step that is skipped returns before the count is advanced: it must leave everything as it was.
template <class Rule>
FUSEDOPT_HD void step_scalars_thread(const StepScalarsArguments& arguments, int64_t row) {
  if (row >= arguments.num_rows) return;
  if (arguments.skip != nullptr && *arguments.skip > 0) return;
  const StepCounter counter = arguments.counters[row];
  if (!counter.active) return;
  GradInfo grads;
  grads.scale = arguments.grad_scale != nullptr ? static_cast<double>(*arguments.grad_scale)
                                                : arguments.host_grad_scale;
  if (arguments.grad_norm != nullptr) grads.norm = *arguments.grad_norm;
  const auto scalars =
      step_scalars<Rule>(hyper_of(arguments.groups[counter.group]), increment(counter), grads);
  if (arguments.in_double)
    static_cast<StepScalars<Rule, double>*>(arguments.scalars)[row] = scalars;
  else
    static_cast<StepScalars<Rule, float>*>(arguments.scalars)[row] = scalars.template as<float>();
}

}  // namespace fusedopt::cuda
