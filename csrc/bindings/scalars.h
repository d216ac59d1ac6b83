// The numbers of a step: how often each parameter has been stepped, and the scalars of its rule
// that follow from that. Parameters on a GPU are counted there if the host cannot know their
// counts.
#pragma once

#include <memory>
#include <vector>

#include "bindings/param_table.h"
#include "bindings/step_call.h"

namespace fusedopt {

// The least number of steps that cannot be counted, as counts become integers.
inline constexpr double kTooManySteps = 9.2e18;

// Finds the scalars of all parameters that are stepped, or what GPUs need to compute them. Params
// whose count is on the host but belongs on a GPU join `context.missing`. Raises ValueError for
// counts that are none, and for options on other GPUs than their params.
void find_scalars(const OptimizerRow& row, const GradInfo& grads, ParamTable& table,
                  StepContext& context);

// Computes the scalars again, once `grads` says what the norm is.
void rescale(const GradInfo& grads, StepContext& context);

// An optimizer that counts no steps treats a parameter's first one differently if it has dampening.
// Whether that step takes place only the GPU knows if it may be skipped there, so it counts it, in
// memory that `kept` holds.
void count_first_steps(ParamTable& table, const StepContext& context,
                       std::vector<std::shared_ptr<void>>& kept);

// Counts the steps that the host counts.
void write_steps(const ParamTable& table, const StepContext& context);

}  // namespace fusedopt
