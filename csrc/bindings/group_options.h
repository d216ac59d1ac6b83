// What the options of a param group come to: the rule and its numbers, and what a state holds then.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "bindings/optimizers.h"
#include "core/layout.h"

namespace fusedopt {

// What a state may have whatever the optimizer.
inline const Key kStep("step");
inline const Key kMasterParam("master_param"), kParamRemainder("param_remainder");
inline const Key kParamRemainder8("param_remainder8");
inline const Key kEmaParam("ema_param");

// What the options of a param group come to.
struct GroupOptions {
  cuda::HyperParamsRef source;
  int scalars_gpu;  // where the numbers of `source` are that are on a GPU, or -1
  RuleId rule;
  uint8_t variant;  // of the rule, its number
  bool capturable;
  bool errs_if_nonfinite;
  Master master_weights;
  bool has_state;
  bool counts_steps;  // the state has a "step"
  States states;      // of the rule that are in use
  // What the state has, in the places of the operands; nullptr for what it has not. Not every param
  // has a master weight (master_for()).
  const Key* names[kMaxOperands];
};
GroupOptions read_options(const OptimizerRow& row, GroupReader& reader);

// The kind of master weight of a param of this dtype in a group that wants `wanted`. Params of 32
// bits and more are their weights. nullopt: such a param cannot have it.
std::optional<Master> master_for(Master wanted, DType param, bool is_complex);
std::string master_is_for(Master kind);  // which params can have it, for messages

// Whether a weight of 24 bits is rounded to them stochastically.
inline bool rounds_remainder(Master master, StochasticRounding rounding) {
  return master == Master::kSplit8 && rounding != StochasticRounding::kNone;
}

}  // namespace fusedopt
