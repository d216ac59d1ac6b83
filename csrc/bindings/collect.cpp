#include "bindings/collect.h"

#include <algorithm>
#include <optional>

#include "bindings/fingerprint.h"
#include "bindings/memory.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Params are found so far ahead of their checks that their descriptions have come from memory when
// they are read.
constexpr size_t kParamsAhead = 4;

// Raises TypeError for a value of the state that is no tensor.
[[noreturn]] void refuse_entry(const ParamId& id, PyObject* key, PyObject* value) {
  const bool is_step = key == kStep.object();
  const char* const advice = is_step ? "; load_state_dict() makes tensors of numbers" : "";
  throw py::type_error(subject(id, py::str(py::handle(key))) +
                       std::string(py::repr(py::handle(value))) + ", but must be a tensor" +
                       advice);
}

void refuse_unless_tensor(PyObject* object, const ParamId& id, const char* name) {
  if (!is_tensor(object))
    throw py::type_error(subject(id, name) + std::string(py::repr(py::type::of(object))) +
                         ", but must be a tensor");
}

void note_gpu(std::vector<bool>& gpus, int gpu) {
  if (gpus.size() <= static_cast<size_t>(gpu)) gpus.resize(static_cast<size_t>(gpu) + 1, false);
  gpus[static_cast<size_t>(gpu)] = true;
}

uint64_t fingerprint_of(PyObject* plain) {
  return plain != nullptr ? fingerprint(plain) : kNoFingerprint;
}

// What holds the rest of this param's weight.
Master find_master(Master wanted, const Operands& operands) {
  PyObject* const param = operands.tensors[kParam];
  TensorView view;
  try {
    if (!read_tensor(param, view, operands.held) || !view.is_supported) return Master::kNone;
  } catch (const UnknownTensorType&) {
    return Master::kNone;  // read_operand() will refuse it, by name
  }
  if (const auto master = master_for(wanted, view.dtype, view.is_complex)) return *master;
  throw py::value_error(subject(operands.id, "") + describe(param) + ", but " +
                        master_is_for(wanted) + "; put it into a param group without");
}

}  // namespace

Collector::Collector(const OptimizerRow& row, ParamTable& table, References& held)
    : row_(row), table_(table), held_(held) {}

StepContext Collector::collect(const py::object& param_groups, const py::object& state,
                               bool is_second) {
  StepContext context;
  context.is_second = is_second;
  StateWalk walk = {state.ptr(), is_plain_dict(state.ptr())};
  if (!walk.is_plain) refuse_unless_mapping(state.ptr(), "state");
  read_groups(param_groups, context);
  resize(context);
  dims_.clear();
  rows_.clear();
  is_collected_ = false;
  struct Found {
    const Group* group;
    std::optional<Operands> operands;
  };
  Found ring[kParamsAhead];
  size_t found = 0, checked = 0;
  const auto check_next = [&] {
    Found& next = ring[checked % kParamsAhead];
    check_param(context, *next.group, *next.operands, checked++);
  };
  for (size_t g = 0; g < context.groups.size(); ++g) {
    const Group& group = context.groups[g];
    const Py_ssize_t size = group.size();
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (found - checked == kParamsAhead) check_next();
      if (found > checked)
        ring[(found - 1) % kParamsAhead].operands->for_each_plain(prefetch_storage);
      const size_t at = found++;
      Found& place = ring[at % kParamsAhead];
      place.group = &group;
      place.operands.emplace(ParamId{group.dict.ptr(), static_cast<int64_t>(g), i}, held_);
      find_param(group, walk, *place.operands, at);
      place.operands->for_each_plain(prefetch_description);
    }
  }
  while (checked < found) check_next();
  table_.dims.swap(dims_);
  table_.rows.swap(rows_);
  is_collected_ = true;
  return context;
}

void Collector::read_groups(const py::object& param_groups, StepContext& context) {
  const auto groups = as_tuple(param_groups.ptr()).cast<py::tuple>();
  context.groups.reserve(groups.size());
  context.scalars.reserve(groups.size());
  for (const py::handle given : groups) {
    const auto index = static_cast<int64_t>(context.groups.size());
    const py::object dict =
        PyDict_CheckExact(given.ptr())
            ? py::reinterpret_borrow<py::object>(given)
            : as_dict(given.ptr(), ("param group " + std::to_string(index)).c_str());
    GroupReader reader(dict.ptr(), index, /*leave_on_gpu=*/true);
    const GroupOptions options = read_options(row_, reader);
    held_.hold(dict);
    context.groups.push_back({dict, reader.params(), options});
    held_.hold_all(std::move(reader.held()));
    context.clips = context.clips || options.source.values.max_grad_norm > 0;
  }
}

// Forgets all about the params if they are others, or if the last collection may have ended
// anywhere.
void Collector::resize(const StepContext& context) {
  size_t count = 0;
  for (const Group& group : context.groups) count += static_cast<size_t>(group.size());
  if (count == table_.updates.size() && is_collected_) return;
  table_.updates.resize(count);
  table_.caches.resize(count);
  for (ParamUpdate& update : table_.updates) update.layout = kDense;
  for (ParamCache& cache : table_.caches) cache.is_disjoint = false;
  if (!table_.specs.empty()) table_.specs.resize(count);
  table_.is_chunked = table_.is_disjoint = table_.is_classified = false;
}

// Has the values and the numbers of the rows that a grad is of take its place.
void Collector::find_rows(Operands& operands) const {
  try {
    const py::tuple found = hit_rows(operands.tensors[kGrad], operands.tensors[kParam]);
    operands.tensors[kGrad] = held_.hold(found[0]);
    operands.rows = held_.hold(found[1]);
    operands.num_rows = found[1].attr("numel")().cast<int64_t>();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_ValueError)) throw;
    const std::string what = subject(operands.id, "grad") + std::string(py::str(error.value()));
    if (error.matches(PyExc_TypeError)) throw py::type_error(what);
    throw py::value_error(what);
  }
}

// Finds a param's tensors among Python's objects.
void Collector::find_param(const Group& group, StateWalk& walk, Operands& operands,
                           size_t at) const {
  const ParamId& id = operands.id;
  PyObject* const param = PyTuple_GET_ITEM(group.params.ptr(), id.index);
  refuse_unless_tensor(param, id, "");
  operands.tensors[kParam] = param;
  PyObject* const grad = held_.hold(get_grad(param));
  const bool is_active = grad != Py_None;
  if (is_active) {
    refuse_unless_tensor(grad, id, "grad");
    operands.tensors[kGrad] = grad;
    if (row_.by_rows) find_rows(operands);
  }
  find_state_dict(group, walk, is_active, operands);
  if (is_active) {
    name_operands(group, operands, at);
    find_state(group, operands);
  }
  operands.find_shards();
}

// Checks what has been found and enters it into the table.
void Collector::check_param(StepContext& context, const Group& group, Operands& operands,
                            size_t at) {
  const ParamId& id = operands.id;
  ParamUpdate& update = table_.updates[at];
  ParamCache& cache = table_.caches[at];
  update.device = kIdle;
  compare_specs(operands, at);  // of all params: where one process has no grad, others may
  if (operands.tensors[kGrad] == nullptr) return keep_layout(update, cache);
  if (!operands.is_complete) {
    if (operands.state != nullptr)
      refuse_partial(row_, group.options.states, operands.state, id.text(),
                     /*is_checkpoint=*/false);
    context.missing.append(py::make_tuple(id.group_index, id.index));
  }

  const Unchanged unchanged = recognise(operands, update, cache);
  const bool has_less = uses_less(update, cache, operands, group) ||
                        (unchanged == Unchanged::kNothing && operands.state != nullptr &&
                         has_unused(row_, group.options, operands.master, operands.state));
  if (has_less) changed_.append(py::make_tuple(id.group_index, id.index));
  const void* const param_before = update.data[kParam];
  const void* const master_before = update.data[kMaster];
  if (unchanged != Unchanged::kAll)
    refresh(group, context.is_second, unchanged, operands, update, cache);
  if (operands.master == Master::kFloat32) context.has_masters = true;
  if (operands.master == Master::kFloat32 && operands.tensors[kMaster] != nullptr &&
      !context.is_second) {
    const bool is_moved =
        update.data[kParam] != param_before || update.data[kMaster] != master_before;
    if (is_moved) cache.writes = kNotCounted;  // until a step has been made
    const int64_t writes = count_writes(operands.tensors[kParam], held_);
    if (writes < 0 || writes != cache.writes)
      context.maybe_written.append(py::make_tuple(id.group_index, id.index));
  }
  if (!context.is_second) {
    const auto* const states = operands.tensors + kFirstState;
    cache.is_first = group.options.states != 0 &&
                     std::all_of(states, states + kMaxStates, [](auto* s) { return s == nullptr; });
  }
  cache.is_fresh = cache.is_fresh || cache.is_first;
  cache.is_complete = operands.is_complete;
  update.device = cache.device;
  update.rule = group.options.rule;
  update.variant = group.options.variant;
  if (update.device == kCpu)
    context.has_cpu = true;
  else
    note_gpu(context.gpus, update.device - kFirstGpu);
  context.has_gpu_counts = context.has_gpu_counts || cache.step_on_gpu;
  if (!cache.is_disjoint) table_.is_disjoint = false;
}

// Finds the dict of a parameter's state. State was created in the order of the parameters, as a
// rule, so following the dict's order saves hashing (a Python call).
void Collector::find_state_dict(const Group& group, StateWalk& walk, bool is_active,
                                Operands& operands) const {
  if (!group.options.has_state && walk.is_plain && PyDict_GET_SIZE(walk.state) == 0) return;
  PyObject* const param = operands.tensors[kParam];
  py::object state;
  if (!walk.is_plain) {
    if (is_active) state = find_in_mapping(walk.state, param);
  } else {
    if (!walk.next)
      visit_entries(walk.state, walk.position, [&](PyObject* key, PyObject* value) {
        if (key == param)
          state = py::reinterpret_borrow<py::object>(value);
        else
          walk.next = py::reinterpret_borrow<py::object>(key);
        return false;
      });
    else if (walk.next.ptr() == param)
      walk.next = py::object();
    if (!state && is_active) state = lookup(walk.state, param);
  }
  if (!is_active || !state) return;
  operands.state =
      PyDict_CheckExact(state.ptr())
          ? held_.hold(std::move(state))
          : held_.hold(as_dict(state.ptr(), ("the state of " + operands.id.text()).c_str()));
}

// The names of what is in use for this param.
void Collector::name_operands(const Group& group, Operands& operands, size_t at) const {
  const GroupOptions& options = group.options;
  std::copy(options.names + kFirstState, options.names + kMaxOperands,
            operands.names + kFirstState);
  for (int k = kFirstState; k < kMaster; ++k)
    if (is_code(table_.updates[at].formats.dtypes[k]))  // and it is likely to be so again
      name_state(group, operands, k, /*are_codes=*/true);
  operands.rounding = options.source.values.stochastic_rounding;
  operands.draws_codes = options.counts_steps && operands.rounding != StochasticRounding::kNone;
  if (options.master_weights == Master::kNone) return;
  operands.master = find_master(options.master_weights, operands);
  if (operands.master == Master::kNone) operands.names[kMaster] = nullptr;
}

// A state in use is a tensor of numbers, or codes and their scales: whatever is there.
void Collector::name_state(const Group& group, Operands& operands, int k, bool are_codes) const {
  const auto s = static_cast<size_t>(k - kFirstState);
  if (group.options.names[k] == nullptr || !row_.can_be_codes(s)) return;
  operands.names[k] = are_codes ? &row_.code_names[s] : group.options.names[k];
  operands.names[scale_of_state(k)] = are_codes ? &row_.scale_names[s] : nullptr;
}

// Not all of a state is there in the form of the step before, so numbers may have come as codes, or
// the reverse.
template <class LookUp>
void Collector::find_other_forms(const Group& group, Operands& operands,
                                 const LookUp& look_up) const {
  const auto lacks = [&](int k) { return operands.has(k) && operands.tensors[k] == nullptr; };
  const auto look_for = [&](int k, bool are_codes) {
    operands.tensors[k] = operands.tensors[scale_of_state(k)] = nullptr;
    name_state(group, operands, k, are_codes);
    look_up(operands.names[k]->object());
    if (are_codes) look_up(operands.names[scale_of_state(k)]->object());
  };
  const auto lacks_some = [&](int k) { return lacks(k) || lacks(scale_of_state(k)); };
  for (int k = kFirstState; k < kMaster; ++k) {
    if (!operands.has(k) || !row_.can_be_codes(static_cast<size_t>(k - kFirstState))) continue;
    const bool are_codes = operands.has_codes(k);
    if (lacks_some(k)) look_for(k, !are_codes);
    if (lacks_some(k)) look_for(k, are_codes);
  }
  operands.is_complete = !group.options.counts_steps || operands.step != nullptr;
  for (int k = kFirstState; k < kMaxTensors; ++k)
    operands.is_complete = operands.is_complete && !lacks(k);
}

// Finds the tensors of a parameter's state in its dict.
void Collector::find_state(const Group& group, Operands& operands) const {
  int left = 0;  // what has not been found
  for (int k = kFirstState; k < kMaxTensors; ++k) left += operands.has(k) ? 1 : 0;
  PyObject* const step_key = group.options.counts_steps ? kStep.object() : nullptr;
  left += step_key != nullptr ? 1 : 0;
  operands.is_complete = left == 0;
  if (operands.state == nullptr) {
    for (int k = kFirstState; k < kMaster; ++k)
      name_state(group, operands, k, /*are_codes=*/false);  // there are none
    return;
  }

  // Keys are interned as a rule, so going through the few entries is cheaper than three lookups.
  PyObject *bad_key = nullptr, *bad_value = nullptr;
  const auto take = [&](PyObject* key, PyObject* value) {
    PyObject** entry = key == step_key ? &operands.step : nullptr;
    for (int k = kFirstState; entry == nullptr && k < kMaxTensors; ++k)
      if (operands.has(k) && key == operands.names[k]->object()) entry = &operands.tensors[k];
    if (entry == nullptr || *entry != nullptr || value == Py_None) return true;
    if (!is_tensor(value)) {
      bad_key = held_.hold(key);
      bad_value = held_.hold(value);
      return false;
    }
    *entry = held_.hold(value);
    return --left > 0;
  };
  Py_ssize_t at = 0;
  if (left > 0) visit_entries(operands.state, at, take);
  if (bad_key != nullptr) refuse_entry(operands.id, bad_key, bad_value);
  const auto look_up = [&](PyObject* name) {
    const py::object value = lookup(operands.state, name);
    if (value) take(name, value.ptr());
    if (bad_key != nullptr) refuse_entry(operands.id, bad_key, bad_value);
  };
  if (left > 0 && step_key != nullptr) look_up(step_key);
  for (int k = kFirstState; left > 0 && k < kMaxTensors; ++k)
    if (operands.has(k)) look_up(operands.names[k]->object());
  operands.is_complete = left == 0;
  if (left > 0) find_other_forms(group, operands, look_up);
}

// A parameter that rests this time: how its memory lay when it was checked is not forgotten.
void Collector::keep_layout(ParamUpdate& update, ParamCache& cache) {
  const Dims* const dims = table_.dims_of(update);
  if (dims == nullptr || !cache.is_disjoint) {
    if (update.layout != kDense) cache.is_disjoint = false;
    update.layout = kDense;
    return;
  }
  add_layout(update, *dims, {});
}

// Whether the options have changed so that the state is to lack something which it had in the step
// before.
bool Collector::uses_less(const ParamUpdate& update, const ParamCache& cache,
                          const Operands& operands, const Group& group) const {
  const auto had = [&](int k) { return update.formats.has(k) && !operands.has(k); };
  bool less =
      (cache.counts_steps && !group.options.counts_steps) || had(kEma) ||
      (update.formats.has(kMaster) && master_of(update.formats.dtypes[kMaster]) != operands.master);
  for (int s = 0; s < kMaxStates; ++s)
    less = less || (contains(row_.omissible, static_cast<size_t>(s)) && had(kFirstState + s));
  return less;
}

// Notices where a DTensor, its states or its grad lie over devices unlike in the step before. What
// torch makes anew in every step, as grads, has the same layout object as a rule.
void Collector::compare_specs(Operands& operands, size_t at) {
  const auto has_spec = [](const Shard& shard) { return shard.spec != nullptr; };
  if (table_.specs.empty()) {
    if (std::none_of(operands.shards, operands.shards + kMaxTensors, has_spec)) return;
    table_.specs.resize(table_.updates.size());
  }
  auto& specs = table_.specs[at];
  const auto take = [&](int k) {
    PyObject* const spec = operands.shards[k].spec;
    py::object& before = specs[static_cast<size_t>(k)];
    if (before.ptr() == spec) return false;
    held_.hold(std::exchange(before, py::reinterpret_borrow<py::object>(spec)));
    return true;
  };
  if (take(kParam)) {
    table_.is_classified = false;
    // Also for later steps, should the parameter rest in this one.
    table_.caches[at].recognizable = false;
    held_.hold(std::exchange(specs[kGrad], py::object()));
    operands.has_known_specs = false;
  }
  if (operands.tensors[kGrad] == nullptr) return;  // it rests: its states have not been found
  for (int k = kFirstState; k < kMaxTensors; ++k)
    if (take(k)) operands.has_known_specs = false;
  if (take(kGrad) || !operands.has_known_specs || !specs[kGrad]) {
    operands.is_grad_alike = are_alike(operands.shards[kGrad].spec, operands.shards[kParam].spec);
    if (!operands.is_grad_alike) held_.hold(std::exchange(specs[kGrad], py::object()));
  }
}

// Of the param, its states and its step together.
uint64_t Collector::fingerprint_of_all(const Operands& operands) const {
  constexpr uint64_t kMissing = 1;
  uint64_t all = fingerprint_of(operands.shards[kParam].tensor);
  const auto join = [&](bool is_there, PyObject* plain) {
    const uint64_t print = is_there ? fingerprint_of(plain) : kMissing;
    all = all == kNoFingerprint || print == kNoFingerprint ? kNoFingerprint
                                                           : join_fingerprints(all, print);
  };
  for (int k = kFirstState; k < kMaxTensors; ++k)
    join(operands.tensors[k] != nullptr, operands.shards[k].tensor);
  PyObject* const step = operands.step;
  join(step != nullptr, step != nullptr && is_plain(step) ? step : nullptr);
  return all;
}

// What of a parameter's tensors is as it was in the step before, so that its update stands. A grad
// of the same form may lie anywhere: the update then points there. The cache has the fingerprints
// of now.
Collector::Unchanged Collector::recognise(const Operands& operands, ParamUpdate& update,
                                          ParamCache& cache) const {
  if (!has_fingerprints()) return Unchanged::kNothing;  // and nothing is recognizable
  const uint64_t all = fingerprint_of_all(operands);
  PyObject* const grad = operands.shards[kGrad].tensor;
  const uint64_t form =
      grad != nullptr && operands.is_grad_alike ? form_fingerprint(grad) : kNoFingerprint;
  const bool same = operands.is_complete && operands.has_known_specs && cache.recognizable &&
                    all == cache.fingerprint && all != kNoFingerprint &&
                    cache.rounding == operands.rounding &&
                    master_of(update.formats.dtypes[kMaster]) == operands.master;
  const bool same_form = form == cache.grad_form && form != kNoFingerprint;
  cache.fingerprint = all;
  cache.grad_form = form;
  cache.recognizable = false;  // unless all is unchanged, until what is not has been read
  if (!same) return Unchanged::kNothing;
  char* const storage = same_form ? storage_data(grad) : nullptr;
  if (storage == nullptr) return Unchanged::kAllButGrad;
  update.data[kGrad] = storage + cache.grad_offset;
  cache.recognizable = true;
  return Unchanged::kAll;
}

}  // namespace fusedopt
