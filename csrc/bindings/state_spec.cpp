#include "bindings/state_spec.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bindings/torch_api.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Calls visit(name) for all that a state with these options has no use for.
template <class Visit>
void visit_unused(const OptimizerRow& row, const GroupOptions& options, Master master,
                  const Visit& visit) {
  for (size_t s = 0; s < row.state_names.size(); ++s)
    if (contains(row.omissible & ~options.states, s))
      for (const std::vector<Key>* names : {&row.state_names, &row.code_names, &row.scale_names})
        visit((*names)[s]);
  for (const Key& name : row.derived) visit(name);
  if (master != Master::kFloat32) visit(kMasterParam);
  if (master != Master::kSplit) visit(kParamRemainder);
  if (master != Master::kSplit8) visit(kParamRemainder8);
  if (!options.source.values.has_ema()) visit(kEmaParam);
  if (!options.counts_steps) visit(kStep);
}

// What is in a state (`has` says what is) and another optimizer's alone, or nullptr.
template <class Has>
const Key* find_foreign(const OptimizerRow& row, const Has& has) {
  const auto is_own = [&](const Key& key) {
    const auto holds = [&](const std::vector<Key>& names) {
      return std::any_of(names.begin(), names.end(),
                         [&](const Key& own) { return std::strcmp(own.name(), key.name()) == 0; });
    };
    return holds(row.state_names) || holds(row.derived) || holds(row.code_names) ||
           holds(row.scale_names);
  };
  for (const OptimizerRow& other : all_optimizers())
    for (const std::vector<Key>* names :
         {&other.state_names, &other.derived, &other.code_names, &other.scale_names})
      for (const Key& name : *names)
        if (!is_own(name) && has(name)) return &name;
  return nullptr;
}

}  // namespace

StateSpec state_spec(const OptimizerRow& row, GroupReader& reader, const py::object& dtype,
                     bool is_strict) {
  const GroupOptions options = read_options(row, reader);
  const TorchDType param = read_torch_dtype(dtype);
  std::optional<Master> master = master_for(options.master_weights, param.dtype, param.is_complex);
  if (!master && !is_strict) master = Master::kNone;
  if (!master)
    throw py::value_error(master_is_for(options.master_weights) + ", not for " +
                          std::string(py::str(dtype)));
  if (is_strict && reader.wants_codes() && (param.is_complex || item_size(param.dtype) > 4))
    throw py::value_error("state_dtype='q8' is for float32, bfloat16 and float16, not for " +
                          std::string(py::str(dtype)));
  if (is_strict && param.is_complex && options.states != 0 && !reader.state_dtype().is_none())
    throw py::value_error("state_dtype=" + std::string(py::str(reader.state_dtype())) +
                          " is for real parameters, not for " + std::string(py::str(dtype)));
  const auto torch = py::module_::import("torch");
  // Weights and averages of 16-bit params are wider than these.
  const bool is_narrow = !param.is_complex && item_size(param.dtype) == 2;
  const py::object wide = is_narrow ? torch.attr("float32") : dtype;
  StateSpec spec;
  spec.state_dtype = reader.state_dtype();
  const py::object state_dtype = spec.state_dtype.is_none() ? dtype : spec.state_dtype;
  spec.counts_steps = options.counts_steps;
  spec.weight_dtype = wide;
  spec.wants_codes = reader.wants_codes();
  for (size_t s = 0; s < row.state_names.size(); ++s)
    if (row.can_be_codes(s))
      spec.codes[row.state_names[s].str()] = py::make_tuple(
          row.code_names[s].str(), torch.attr(contains(row.signed_codes, s) ? "int8" : "uint8"),
          row.scale_names[s].str());
  const auto add = [](py::list& list, const Key& name, const char* kind, const py::object& dtype) {
    list.append(py::make_tuple(name.str(), kind, dtype));
  };
  for (size_t s = 0; s < row.state_names.size(); ++s) {
    if (contains(options.states, s)) add(spec.entries, row.state_names[s], "state", state_dtype);
    if (contains(row.omissible, s)) add(spec.omissible, row.state_names[s], "state", state_dtype);
  }
  if (row.start_option)
    spec.starts[row.state_names[static_cast<size_t>(row.started_state)].str()] =
        reader.number_or(*row.start_option, 0);
  if (*master == Master::kFloat32) add(spec.entries, kMasterParam, "master", wide);
  if (*master == Master::kSplit)
    add(spec.entries, kParamRemainder, "remainder", torch.attr("int16"));
  if (*master == Master::kSplit8)
    add(spec.entries, kParamRemainder8, "remainder8", torch.attr("int8"));
  if (options.source.values.has_ema()) add(spec.entries, kEmaParam, "average", wide);
  visit_unused(row, options, *master, [&](const Key& name) { spec.unused.append(name.str()); });
  return spec;
}

py::dict names_of_weights() {
  py::dict names;
  names["master"] = kMasterParam.name();
  names["remainder"] = kParamRemainder.name();
  names["remainder8"] = kParamRemainder8.name();
  names["average"] = kEmaParam.name();
  return names;
}

bool has_unused(const OptimizerRow& row, const GroupOptions& options, Master master,
                PyObject* state) {
  bool found = false;
  visit_unused(row, options, master,
               [&](const Key& name) { found = found || lookup(state, name.object()); });
  return found;
}

void refuse_partial(const OptimizerRow& row, States in_use, PyObject* state,
                    const std::string& place, bool is_checkpoint) {
  const auto has = [&](const Key& key) {
    const py::object value = lookup(state, key.object());
    return value && !value.is_none();
  };
  const Key* missing = nullptr;
  bool may_be_missing = true;
  const auto miss = [&](const Key& key, bool is_omissible) {
    if (missing == nullptr) missing = &key;
    may_be_missing = may_be_missing && is_omissible;
  };
  for (size_t s = 0; s < row.state_names.size(); ++s)
    if (contains(row.required & in_use, s) && !has(row.state_names[s]) && !has(row.code_names[s]) &&
        !has(row.scale_names[s]))
      miss(row.state_names[s], !is_checkpoint && contains(row.omissible, s));
  for (size_t s = 0; s < row.code_names.size(); ++s)
    if (has(row.code_names[s]) != has(row.scale_names[s]))
      miss(has(row.code_names[s]) ? row.scale_names[s] : row.code_names[s], false);
  if (!has(kStep) && (row.always_counts || has(kEmaParam)))
    miss(kStep, false);  // an average without its count would start anew
  if (may_be_missing) {
    const Key* const foreign = is_checkpoint ? find_foreign(row, has) : nullptr;
    if (foreign == nullptr) return;
    throw py::value_error("the state of " + place + " has '" + foreign->name() + "', which " +
                          row.name + " has not: it is another optimizer's");
  }
  References keys;
  Py_ssize_t at = 0;
  visit_entries(state, at, [&](PyObject* key, PyObject* value) {
    if (value != Py_None) keys.hold(key);
    return true;
  });
  std::string others;
  for (const py::object& key : keys) {
    const bool is_master = key.equal(py::str(kMasterParam.name())) ||
                           key.equal(py::str(kParamRemainder.name())) ||
                           key.equal(py::str(kParamRemainder8.name()));
    if (!is_master) others += (others.empty() ? "" : ", ") + std::string(py::repr(key));
  }
  if (others.empty()) return;  // a parameter that has not been stepped
  throw py::value_error("the state of " + place + " has no '" + missing->name() + "', but has " +
                        others +
                        ": it is another optimizer's, or incomplete; load all of it, or delete the "
                        "parameter's state for a fresh start");
}

}  // namespace fusedopt
