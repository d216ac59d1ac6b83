#pragma once

#include <cstdint>

#include "core/gpu.h"
#include "core/schedule.h"

// What one thread of the schedule kernel does: it advances the step count of one parameter and
// computes the scalars of its update, where only the device knows step, hyper-parameters or
// whether the step is to be skipped.
namespace fusedopt::cuda {

// All pointers are into device memory. Row r of the clocks belongs to row r of the works; the rows
// of `num_rows` lie in one column, and their scalars are of its type.
struct ScheduleArguments {
  const Clock* clocks;
  const HyperSource* groups;
  void* scalars;
  const float* grad_scale;
  const float* skip;
  const double* grad_norm;  // nullptr: not needed
  int64_t num_rows;
  bool in_double;
};

FUSEDOPT_HD double number_of(const DeviceNumber& number, double otherwise) {
  if (number.data == nullptr) return otherwise;
  if (number.dtype == DType::kFloat64) return *static_cast<const double*>(number.data);
  return static_cast<double>(*static_cast<const float*>(number.data));
}

FUSEDOPT_HD Hyper hyper_of(const HyperSource& source) {
  Hyper hyper = source.values;
  hyper.lr = number_of(source.lr, hyper.lr);
  hyper.weight_decay = number_of(source.weight_decay, hyper.weight_decay);
  hyper.momentum = number_of(source.momentum, hyper.momentum);
  hyper.dampening = number_of(source.dampening, hyper.dampening);
  hyper.beta1 = number_of(source.beta1, hyper.beta1);
  hyper.beta2 = number_of(source.beta2, hyper.beta2);
  hyper.eps = number_of(source.eps, hyper.eps);
  return hyper;
}

// Adds 1 to the step count and returns when that is.
FUSEDOPT_HD Time advance(const Clock& clock) {
  if (clock.step == nullptr) return {0, clock.is_first};
  const bool is_double = clock.dtype == DType::kFloat64;
  const double done =
      is_double ? *static_cast<double*>(clock.step) : double{*static_cast<float*>(clock.step)};
  const double step = done + 1;
  if (is_double)
    *static_cast<double*>(clock.step) = step;
  else
    *static_cast<float*>(clock.step) = static_cast<float>(step);
  return {static_cast<uint64_t>(step), clock.is_first || (clock.is_fresh && done == 0)};
}

template <class Rule>
FUSEDOPT_HD void schedule_thread(const ScheduleArguments& arguments, int64_t row) {
  if (row >= arguments.num_rows) return;
  if (arguments.skip != nullptr && *arguments.skip > 0) return;
  const Clock clock = arguments.clocks[row];
  if (!clock.active) return;
  GradFacts grads;
  if (arguments.grad_scale != nullptr) grads.scale = static_cast<double>(*arguments.grad_scale);
  if (arguments.grad_norm != nullptr) grads.norm = *arguments.grad_norm;
  const auto scalars =
      schedule<Rule>(hyper_of(arguments.groups[clock.group]), advance(clock), grads);
  if (arguments.in_double)
    static_cast<StepScalars<Rule, double>*>(arguments.scalars)[row] = scalars;
  else
    static_cast<StepScalars<Rule, float>*>(arguments.scalars)[row] = scalars.template as<float>();
}

}  // namespace fusedopt::cuda
