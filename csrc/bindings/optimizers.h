#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/options.h"
#include "core/layout.h"
#include "core/rules.h"

// The table of optimizers: for each, the names torch gives to its state and how a param group's
// options become the rule's numbers. One row is what adding an optimizer takes here. It is also the
// only source of what a parameter's state holds: fusedopt/_state.py asks for a StateSpec.
namespace fusedopt {

// The tensors of an update: the operands, and the scales of states that are codes (core/codes.h).
inline constexpr int kFirstScale = kMaxOperands;
inline constexpr int kMaxTensors = kFirstScale + kMaxStates;
constexpr int scale_of_state(int operand) { return kFirstScale + (operand - kFirstState); }

// What the names of codes and of their scales add to the name of a state.
inline constexpr char kCodesSuffix[] = "_q8", kScalesSuffix[] = "_scale";

// States of a rule, a bit for each.
using States = unsigned;

// A rule that drivers know by its id, and which one it is of those that share one's kernel.
struct RuleChoice {
  RuleId id;
  uint8_t member;  // HyperParams::member
};

struct OptimizerRow {
  const char* name;
  std::vector<Key> state_names;  // by the rule's numbers
  States required;               // without those in use, a state is incomplete
  States omissible;              // of these: left out where they are not in use
  bool always_counts;            // the state has "step" whatever the options
  void (*read)(GroupReader& group, cuda::HyperParamsRef& source);  // checks every value
  // An option whose number a state begins with, in place of 0; and which one that is.
  std::optional<Key> start_option = {};
  int started_state = 0;
  bool by_rows = false;           // grads are of some of the rows, and others are left alone
  std::vector<Key> derived = {};  // what torch keeps in the state and here follows from "step"
  // What follows from the rule.
  RuleChoice rule = {};
  std::optional<RuleChoice> cautious_rule = {};  // of groups with a caution, if there may be any
  States second_moments = 0;
  States signed_codes = 0, positive_codes = 0;         // that can be codes of 8 bits, of which kind
  std::vector<Key> code_names = {}, scale_names = {};  // of these, by the rule's numbers

  bool can_be_codes(int state) const { return ((signed_codes | positive_codes) >> state & 1) != 0; }
};
// Reads the options that the rule computes with.
cuda::HyperParamsRef read_hyper(const OptimizerRow& row, GroupReader& reader);

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

// What the state of a parameter of a dtype (a torch.dtype) is to hold.
struct StateSpec {
  // (name, kind, torch.dtype) of each tensor but "step". Kinds are "state", which begins as zeros
  // unless `starts` says otherwise, "master", "remainder", "remainder8" and "average".
  pybind11::list entries;
  pybind11::list left_out;  // of the optimizer, but the options have no use for them
  pybind11::list unused;    // names of all that other options may have left in the state
  // Of states that can be codes: (name of the codes, their torch.dtype, name of the scales).
  pybind11::dict codes;
  bool wants_codes;               // where the param can have them
  pybind11::dict starts;          // of states that do not begin as zeros: the number they do with
  bool counts_steps;              // there is a "step"
  pybind11::object state_dtype;   // a torch.dtype, or None where the states' own decide
  pybind11::object weight_dtype;  // of master weights, averages and copies of the weights
};
// Raises ValueError for a param that cannot have the master weight that is asked for; without
// `is_strict`, it has none.
StateSpec state_spec(const OptimizerRow& row, GroupReader& reader, const pybind11::object& dtype,
                     bool is_strict);

// The names in a state of the kinds "master", "remainder", "remainder8" and "average".
pybind11::dict names_of_weights();

// Whether a state has any of what StateSpec::unused lists.
bool has_unused(const OptimizerRow& row, const GroupOptions& options, Master master,
                PyObject* state);

// Raises ValueError for a state that lacks some of what every step of the optimizer leaves there,
// but holds other things: it is another optimizer's, or was cut short. What an option needs may be
// missing, since it may have been switched on later. A state that some options have no use for
// (exp_avg, with a beta1 of 0) may be missing if all else is there, but not from a checkpoint,
// which is written with all of them. `place`: the parameter, for the message.
void refuse_partial(const OptimizerRow& row, States in_use, PyObject* state,
                    const std::string& place, bool is_checkpoint);

// Raises ValueError for an unknown name.
const OptimizerRow& find_optimizer(const std::string& name);

}  // namespace fusedopt
