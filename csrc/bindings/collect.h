// Goes through the param groups and the state, checks all that it finds and enters it into the
// table. Every tensor is looked at in every step: what the table has of it is used only if its
// fingerprint shows that it is what it was. Nothing that Python can see is changed.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "bindings/operands.h"
#include "bindings/param_table.h"
#include "bindings/python.h"
#include "bindings/state_spec.h"
#include "bindings/step_call.h"

namespace fusedopt {

class Collector {
 public:
  // `held` keeps all that is found until the step ends.
  Collector(const OptimizerRow& row, ParamTable& table, References& held);

  // Raises for what cannot be stepped. `is_second`: the state that was missing has been created.
  StepContext collect(const pybind11::object& param_groups, const pybind11::object& state,
                      bool is_second);

  // A list of (group, index) of the params that have come to use less state since this was called
  // last, or None.
  pybind11::object take_changed() {
    if (changed_.empty()) return pybind11::none();
    return std::exchange(changed_, pybind11::list());
  }

 private:
  // Where a collection stands in the dict of all state.
  struct StateWalk {
    PyObject* state;             // borrowed from the caller of step()
    bool is_plain;               // see is_plain_dict()
    Py_ssize_t position = 0;     // PyDict_Next's, whose order is nearly always of the parameters:
    pybind11::object next = {};  // the parameter whose entry was found there in place of another's
  };
  enum class Unchanged { kNothing, kAllButGrad, kAll };

  void read_groups(const pybind11::object& param_groups, StepContext& context);
  void resize(const StepContext& context);
  void find_param(const Group& group, StateWalk& walk, Operands& operands, size_t at) const;
  void check_param(StepContext& context, const Group& group, Operands& operands, size_t at);
  void find_rows(Operands& operands) const;
  void find_state_dict(const Group& group, StateWalk& walk, bool is_active,
                       Operands& operands) const;
  void name_operands(const Group& group, Operands& operands, size_t at) const;
  void name_state(const Group& group, Operands& operands, int k, bool are_codes) const;
  void find_state(const Group& group, Operands& operands) const;
  template <class LookUp>
  void find_other_forms(const Group& group, Operands& operands, const LookUp& look_up) const;
  void keep_layout(ParamUpdate& update, ParamCache& cache);
  bool uses_less(const ParamUpdate& update, const ParamCache& cache, const Operands& operands,
                 const Group& group) const;
  void compare_specs(Operands& operands, size_t at);
  uint64_t fingerprint_of_all(const Operands& operands) const;
  Unchanged recognise(const Operands& operands, ParamUpdate& update, ParamCache& cache) const;

  // For what is not as it was (refresh.cpp).
  void refresh(const Group& group, bool is_second, Unchanged unchanged, Operands& operands,
               ParamUpdate& update, ParamCache& cache);
  void refuse_both_forms(const Group& group, const Operands& operands) const;
  void read_param_and_grad(Operands& operands, ParamCache& cache);
  void read_state(bool is_second, Operands& operands, const ParamUpdate& update,
                  ParamCache& cache) const;
  uint8_t rounded_stochastically(const Operands& operands) const;
  void enter(const Operands& operands, ParamUpdate& update, ParamCache& cache);
  void lay_out(const Operands& operands, ParamUpdate& update);
  void lay_out_rows(const Operands& operands, ParamUpdate& update, Dims dims);
  void add_layout(ParamUpdate& update, Dims dims, Rows rows);

  const OptimizerRow& row_;
  ParamTable& table_;
  References& held_;
  std::vector<Dims> dims_;  // of this collection; the table has those of the one before
  std::vector<Rows> rows_;
  bool is_collected_ = true;  // the last collection came to its end
  pybind11::list changed_;
};

}  // namespace fusedopt
