// What a parameter's state is to hold, and what is wrong with one that holds other things. It is
// the only source of that: fusedopt/_state.py asks for a StateSpec.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/group_options.h"

namespace fusedopt {

// What the state of a parameter of a dtype (a torch.dtype) is to hold.
struct StateSpec {
  // (name, kind, torch.dtype) of each tensor but "step". Kinds are "state", which begins as zeros
  // unless `starts` says otherwise, "master", "remainder", "remainder8" and "average".
  pybind11::list entries;
  pybind11::list omissible;  // the same of states that other options leave out: zeros, if absent
  pybind11::list unused;     // names of all that other options may have left in the state
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

}  // namespace fusedopt
