// The table of optimizers: for each, the names torch gives to its state and how a param group's
// options become the rule's numbers. One row is what adding an optimizer takes here.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/options.h"
#include "core/layout.h"
#include "core/rules.h"

namespace fusedopt {

// What the names of codes and of their scales add to the name of a state.
inline constexpr char kCodesSuffix[] = "_q8", kScalesSuffix[] = "_scale";

// States of a rule, a bit for each.
using States = unsigned;
constexpr bool contains(States states, size_t state) { return (states >> state & 1) != 0; }

// A rule that drivers know by its id, and which one it is of those that share one's kernel.
struct RuleChoice {
  RuleId id;
  uint8_t member;  // HyperParams::member
};

struct OptimizerRow {
  const char* name;
  void (*read)(GroupReader& group, cuda::HyperParamsRef& source);  // checks every value
  RuleChoice rule = {};
  std::optional<RuleChoice> cautious_rule = {};  // of groups with a caution, if there may be any

  // By the rule's numbers of states; those of codes and scales for states that can be codes.
  std::vector<Key> state_names = {}, code_names = {}, scale_names = {};
  States required = 0;   // without those in use, a state is incomplete
  States omissible = 0;  // of these: left out where they are not in use
  States second_moments = 0;
  States signed_codes = 0, positive_codes = 0;  // that can be codes of 8 bits, of which kind
  // An option whose number a state begins with, in place of 0; and which one that is.
  std::optional<Key> start_option = {};
  int started_state = 0;
  std::vector<Key> derived = {};  // what torch keeps in the state and here follows from "step"
  bool always_counts = false;     // the state has "step" whatever the options
  bool by_rows = false;           // grads are of some of the rows, and others are left alone

  bool can_be_codes(size_t state) const { return contains(signed_codes | positive_codes, state); }
};

// All of them; and the one of that name, else ValueError.
const std::vector<OptimizerRow>& all_optimizers();
const OptimizerRow& find_optimizer(const std::string& name);

// Reads the options that the rule computes with.
cuda::HyperParamsRef read_hyper(const OptimizerRow& row, GroupReader& reader);

// What grads of the group are clipped to, or 0 if they are not.
double read_max_grad_norm(GroupReader& group);

// The rule of a group with these options.
RuleChoice rule_for(const OptimizerRow& row, const HyperParams& hyper);

}  // namespace fusedopt
