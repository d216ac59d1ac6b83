#include <algorithm>
#include <cmath>

#include "bindings/fingerprint.h"
#include "bindings/memory.h"
#include "bindings/plan.h"

// The part of Plan that goes through the parameters: about half a microsecond for each.
namespace py = pybind11;

namespace fusedopt {
namespace {

// Parameters that are walked together.
constexpr int kBlock = 8;

// Raises TypeError for a value of the state that is no tensor.
[[noreturn]] void refuse_entry(const Place& place, PyObject* key, PyObject* value, bool is_step) {
  const char* const advice = is_step ? "; load_state_dict() makes tensors of numbers" : "";
  throw py::type_error(subject(place, py::str(py::handle(key))) +
                       std::string(py::repr(py::handle(value))) + ", but must be a tensor" +
                       advice);
}

void refuse_unless_tensor(PyObject* object, const Place& place, const char* name) {
  if (!is_tensor(object))
    throw py::type_error(subject(place, name) + std::string(py::repr(py::type::of(object))) +
                         ", but must be a tensor");
}

// Asks for the entries of a dict, which lie apart from it.
void prefetch_entries(PyObject* dict) {
  const char* const keys = reinterpret_cast<char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
}

void note_gpu(std::vector<bool>& gpus, int gpu) {
  if (gpus.size() <= static_cast<size_t>(gpu)) gpus.resize(static_cast<size_t>(gpu) + 1, false);
  gpus[static_cast<size_t>(gpu)] = true;
}

// `key` holds the number of the step and whether the state is new.
Scalars scalars_for(RuleId rule, const Hyper& hyper, std::pair<double, bool> key,
                    const GradFacts& grads) {
  const Time time = {static_cast<uint64_t>(key.first), key.second};
  Scalars scalars;
  with_rule(rule, [&](auto of) {
    using Rule = decltype(of);
    scalars.set(fusedopt::schedule<Rule>(hyper, time, grads));
  });
  return scalars;
}

// What holds the rest of this param's weight. Params of 32 bits and more are their weights.
Master find_master(Master wanted, PyObject* param, const Place& place, References& held) {
  TensorView view;
  try {
    if (!read_tensor(param, view, held) || !view.is_supported) return Master::kNone;
  } catch (const UnknownTensorType&) {
    return Master::kNone;  // read_operand() will refuse it, by name
  }
  if (wanted == Master::kFloat32 && item_size(view.dtype) > 2) return Master::kNone;
  if (view.is_complex || (wanted == Master::kSplit && view.dtype != DType::kBFloat16))
    throw py::value_error(subject(place, "") + describe(param) + ", but master_weights='" +
                          (wanted == Master::kSplit ? "split' is for torch.bfloat16"
                                                    : "float32' is for real numbers") +
                          "; put it into a param group without");
  return wanted;
}

template <class Found, class F>
void for_each_state(const Found& found, const F& f) {
  for (int k = kFirstState; k < kMaxOperands; ++k)
    if (found.tensors[k] != nullptr) f(found.tensors[k]);
  if (found.step != nullptr) f(found.step);
}

}  // namespace

void Plan::walk(Walk& walk) {
  size_t count = 0;
  for (const Group& group : walk.groups)
    count += static_cast<size_t>(PyTuple_GET_SIZE(group.params.ptr()));
  if (count != works_.size() || !walked_) {  // the last walk may have ended anywhere
    works_.resize(count);
    slots_.resize(count);
    for (Work& work : works_) work.layout = kDense;
    for (Slot& slot : slots_) slot.is_disjoint = false;
    chunked_ = disjoint_ = false;
  }
  walked_ = false;
  if (walk.gpu_counts) clocks_.assign(count, {});
  size_t at = 0;
  for (size_t g = 0; g < walk.groups.size(); ++g) {
    const Py_ssize_t size = PyTuple_GET_SIZE(walk.groups[g].params.ptr());
    for (Py_ssize_t first = 0; first < size; first += kBlock) {
      const int n = static_cast<int>(std::min<Py_ssize_t>(kBlock, size - first));
      walk_block(walk, walk.groups[g], static_cast<int64_t>(g), first, n, at);
      at += static_cast<size_t>(n);
    }
  }
  dims_.swap(walk.dims);
  walked_ = true;
}

// With thousands of tensors their objects are out of the caches by the next step, and each hides
// behind the one before: param, state, tensors, their descriptions, their storage. So a block of
// parameters is taken one layer at a time, asking for the next layer of all of them.
void Plan::walk_block(Walk& walk, Group& group, int64_t group_index, Py_ssize_t first, int n,
                      size_t at) {
  PyObject* params[kBlock];
  for (int j = 0; j < n; ++j) params[j] = PyTuple_GET_ITEM(group.params.ptr(), first + j);
  for (int j = 0; j < n; ++j) __builtin_prefetch(params[j]);
  for (int j = 0; j < n; ++j)
    refuse_unless_tensor(params[j], {group.dict.ptr(), group_index, first + j}, "");
  for (int j = 0; j < n; ++j) prefetch_description(params[j]);
  for (int j = 0; j < n; ++j) prefetch_storage(params[j]);
  PyObject *grads[kBlock], *states[kBlock];
  for (int j = 0; j < n; ++j) {
    const Place place = {group.dict.ptr(), group_index, first + j};
    grads[j] = held_.hold(get_grad(params[j]));
    if (grads[j] != Py_None) refuse_unless_tensor(grads[j], place, "grad");
    states[j] = find_state_dict(walk, group, params[j], grads[j] != Py_None, place);
    if (states[j] != nullptr) __builtin_prefetch(states[j]);
    __builtin_prefetch(slots_[at + static_cast<size_t>(j)].step);
    prefetch_description(grads[j]);
  }
  for (int j = 0; j < n; ++j)
    if (states[j] != nullptr) prefetch_entries(states[j]);
  Found found[kBlock];
  for (int j = 0; j < n; ++j) {
    const Place place = {group.dict.ptr(), group_index, first + j};
    prefetch_storage(grads[j]);
    found[j].tensors[kParam] = params[j];
    found[j].tensors[kGrad] = grads[j];
    found[j].state = states[j];
    if (grads[j] == Py_None) continue;
    name_states(group, place, found[j]);
    found[j].is_complete = find_state(states[j], group, place, found[j]);
    if (!found[j].is_complete && states[j] != nullptr)
      refuse_partial(row_, group.states, states[j], place, /*is_checkpoint=*/false);
    for_each_state(found[j], [](PyObject* tensor) { __builtin_prefetch(tensor); });
  }
  for (int j = 0; j < n; ++j) for_each_state(found[j], prefetch_description);
  for (int j = 0; j < n; ++j) for_each_state(found[j], prefetch_storage);
  for (int j = 0; j < n; ++j)
    visit(walk, group, {group.dict.ptr(), group_index, first + j}, found[j],
          at + static_cast<size_t>(j));
}

// The dict of a parameter's state, held, or nullptr. State was created in the order of the
// parameters, as a rule, so following the dict's order saves hashing (a Python call).
PyObject* Plan::find_state_dict(Walk& walk, const Group& group, PyObject* param, bool active,
                                const Place& place) {
  if (!group.has_state()) return nullptr;
  py::object state;
  if (!walk.state_is_plain) {
    if (active) state = find_in_mapping(walk.state, param);
  } else {
    if (!walk.next_param)
      visit_entries(walk.state, walk.state_at, [&](PyObject* key, PyObject* value) {
        if (key == param)
          state = py::reinterpret_borrow<py::object>(value);
        else
          walk.next_param = py::reinterpret_borrow<py::object>(key);
        return false;
      });
    else if (walk.next_param.ptr() == param)
      walk.next_param = py::object();
    if (!state && active) state = lookup(walk.state, param);
  }
  if (!active || !state) return nullptr;
  if (PyDict_CheckExact(state.ptr())) return held_.hold(std::move(state));
  return held_.hold(as_dict(state.ptr(), ("the state of " + place.text()).c_str()));
}

void Plan::name_states(Group& group) const {
  for (int s = 0; s < kMaxStates; ++s)
    if ((group.states >> s & 1) != 0)
      group.names[kFirstState + s] = &row_.state_names[static_cast<size_t>(s)];
  if (group.master_weights != Master::kNone)
    group.names[kMaster] =
        group.master_weights == Master::kSplit ? &kParamRemainder : &kMasterParam;
  if (group.source.values.has_ema()) group.names[kAverage] = &kEmaParam;
  for (const Key* const name : group.names) group.num_names += name != nullptr ? 1 : 0;
}

// The names of what is in use for this param: wide ones have no master weight.
void Plan::name_states(const Group& group, const Place& place, Found& found) {
  std::copy(std::begin(group.names), std::end(group.names), found.names);
  if (group.master_weights != Master::kNone)
    found.master = find_master(group.master_weights, found.tensors[kParam], place, held_);
  const bool lacks_master = found.names[kMaster] != nullptr && found.master == Master::kNone;
  if (lacks_master) found.names[kMaster] = nullptr;
  found.num_names = group.num_names - (lacks_master ? 1 : 0);
}

// Finds the tensors of a parameter's state in its dict; true if all that the step needs are there.
bool Plan::find_state(PyObject* state, const Group& group, const Place& place, Found& found) {
  if (state == nullptr) return !group.counts_steps && found.num_names == 0;

  // Keys are interned as a rule, so going through the few entries is cheaper than three lookups.
  PyObject* const step_key = group.counts_steps ? kStep.object() : nullptr;
  int left = found.num_names + (group.counts_steps ? 1 : 0);
  PyObject *bad_key = nullptr, *bad_value = nullptr;
  const auto take = [&](PyObject* key, PyObject* value) {
    PyObject** entry = key == step_key ? &found.step : nullptr;
    for (int k = kFirstState; entry == nullptr && k < kMaxOperands; ++k)
      if (found.names[k] != nullptr && key == found.names[k]->object()) entry = &found.tensors[k];
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
  if (left > 0) visit_entries(state, at, take);
  if (bad_key != nullptr) refuse_entry(place, bad_key, bad_value, bad_key == step_key);
  if (left == 0) return true;

  const auto look_up = [&](PyObject* name) {
    const py::object value = lookup(state, name);
    if (value) take(name, value.ptr());
    if (bad_key != nullptr) refuse_entry(place, bad_key, bad_value, bad_key == step_key);
  };
  if (step_key != nullptr) look_up(step_key);
  for (const Key* const name : found.names)
    if (name != nullptr) look_up(name->object());
  return left == 0;
}

void Plan::visit(Walk& walk, Group& group, const Place& place, const Found& found, size_t at) {
  Work& work = works_[at];
  Slot& slot = slots_[at];
  const bool active = found.tensors[kGrad] != Py_None;
  work.device = kIdle;
  // Of all params: where one process has no grad, others may.
  walk.has_subclasses = walk.has_subclasses || !is_plain(found.tensors[kParam]);
  if (!active) return keep_layout(walk, work, slot);

  const bool is_known = found.is_complete &&
                        master_of(work.formats.dtypes[kMaster]) == found.master &&
                        slot.rounding == group.source.values.stochastic_rounding;
  const Unchanged unchanged = compare(found, is_known, slot);
  if (uses_less(work, slot, found, group) ||
      (unchanged == Unchanged::kNothing && has_unused_state(found, group)))
    changed_.append(py::make_tuple(place.group_index, place.index));
  if (unchanged != Unchanged::kAll) {
    Operands operands(place, held_);
    take_over(group, found, operands, slot);
    read_param_and_grad(operands, slot);
    const TensorView& grad = operands.views[kGrad];
    if (unchanged == Unchanged::kAllButGrad && work.formats.dtypes[kGrad] == grad.dtype &&
        is_contiguous(grad) && is_contiguous(operands.views[kParam]))
      work.data[kGrad] = grad.data;  // so check_grads() looks at it again
    else
      read_rest(walk, operands, found.is_complete, work, slot);
    slot.recognizable = found.is_complete && work.layout == kDense &&
                        operands.views[kParam].ndim <= kMaxFingerprintDims;
  }
  if (!walk.is_second) {
    const auto* const states = found.tensors + kFirstState;
    slot.is_first =
        group.states != 0 && std::count(states, states + kMaxStates, nullptr) == kMaxStates;
  }
  slot.is_fresh = slot.is_fresh || slot.is_first;
  work.device = slot.device;
  work.rule = row_.rule;
  work.variant = group.variant;
  work.norm_class = 0;
  if (work.device == kCpu)
    walk.has_cpu = true;
  else
    note_gpu(walk.gpus, work.device - kFirstGpu);
  if (work.device != kCpu && walk.gpu_counts) {
    set_clock(walk, group, place, found.is_complete, at);
  } else {
    if (group.counts_steps && found.is_complete && !slot.step_on_gpu) read_step(place, slot);
    work.scalars = schedule(walk, group, slot);
  }
  walk.has_gpu_counts = walk.has_gpu_counts || slot.step_on_gpu;
  if (!slot.is_disjoint) disjoint_ = false;
  append(walk.written.ptr(), found.tensors[kParam]);
}

// A parameter that rests this time: how its memory lay when it was checked is not forgotten.
void Plan::keep_layout(Walk& walk, Work& work, Slot& slot) const {
  const Dims* const dims = dims_of(work);
  if (dims == nullptr || !slot.is_disjoint) {
    if (work.layout != kDense) slot.is_disjoint = false;
    work.layout = kDense;
    return;
  }
  work.layout = static_cast<int32_t>(walk.dims.size());
  walk.dims.push_back(*dims);
}

// Whether the options have changed so that the state is to lack something which it had in the step
// before.
bool Plan::uses_less(const Work& work, const Slot& slot, const Found& found,
                     const Group& group) const {
  const auto had = [&](int k) { return work.formats.has(k) && found.names[k] == nullptr; };
  bool less =
      (slot.counts_steps && !group.counts_steps) || had(kAverage) ||
      (work.formats.has(kMaster) && master_of(work.formats.dtypes[kMaster]) != found.master);
  for (int s = 0; s < kMaxStates; ++s)
    less = less || ((row_.omissible >> s & 1) != 0 && had(kFirstState + s));
  return less;
}

// Whether a state has what another setting has left there.
bool Plan::has_unused_state(const Found& found, const Group& group) const {
  if (found.state == nullptr) return false;
  const auto is_unused = [&](const Key& key, bool used) {
    return !used && lookup(found.state, key.object());
  };
  for (size_t s = 0; s < row_.state_names.size(); ++s)
    if ((row_.omissible >> s & 1) != 0 &&
        is_unused(row_.state_names[s], (group.states >> s & 1) != 0))
      return true;
  return is_unused(kMasterParam, found.master == Master::kFloat32) ||
         is_unused(kParamRemainder, found.master == Master::kSplit) ||
         is_unused(kEmaParam, group.source.values.has_ema()) ||
         is_unused(kStep, group.counts_steps);
}

void Plan::take_over(const Group& group, const Found& found, Operands& operands, Slot& slot) const {
  operands.step = found.step;
  operands.master = found.master;
  operands.rounding = slot.rounding = group.source.values.stochastic_rounding;
  if (slot.counts_steps && !group.counts_steps) {  // its count is gone, or will be
    slot.step = nullptr;
    slot.step_on_gpu = false;
  }
  slot.counts_steps = group.counts_steps;
  std::copy(std::begin(found.tensors), std::end(found.tensors), operands.tensors);
  for (int k = kFirstState; k < kMaxOperands; ++k)
    if (found.names[k] != nullptr) operands.names[k] = found.names[k]->name();
}

// What of a parameter's tensors is as it was in the step before, so that its work stands.
Plan::Unchanged Plan::compare(const Found& found, bool is_known, Slot& slot) const {
  if (!has_fingerprints()) return Unchanged::kNothing;
  const auto print_of = [](PyObject* tensor) {
    return is_plain(tensor) ? fingerprint(tensor) : kNoFingerprint;
  };
  uint64_t all = print_of(found.tensors[kParam]);
  for (int k = kFirstState; k <= kMaxOperands; ++k) {
    PyObject* const tensor = k == kMaxOperands ? found.step : found.tensors[k];
    const uint64_t print = tensor == nullptr ? 1 : print_of(tensor);
    all = all == kNoFingerprint || print == kNoFingerprint ? kNoFingerprint
                                                           : join_fingerprints(all, print);
  }
  const uint64_t grad = print_of(found.tensors[kGrad]);
  const bool same =
      is_known && slot.recognizable && all == slot.fingerprint && all != kNoFingerprint;
  const bool same_grad = grad == slot.grad_fingerprint && grad != kNoFingerprint;
  slot.fingerprint = all;
  slot.grad_fingerprint = grad;
  if (!same) return Unchanged::kNothing;
  return same_grad ? Unchanged::kAll : Unchanged::kAllButGrad;
}

// What the GPU needs to know to count a parameter's step.
void Plan::set_clock(Walk& walk, const Group& group, const Place& place, bool is_complete,
                     size_t at) {
  const Slot& slot = slots_[at];
  const int gpu = slot.device - kFirstGpu;
  if (group.numbers_gpu >= 0 && group.numbers_gpu != gpu)
    throw py::value_error("options of param group " + std::to_string(place.group_index) +
                          " are tensors on cuda:" + std::to_string(group.numbers_gpu) + ", but " +
                          place.text() + " is on cuda:" + std::to_string(gpu));
  // A count on the host is moved as one that is missing is created; where both are one there is
  // nothing to move.
  if (group.counts_steps && !slot.step_on_gpu && !walk.is_second && !cuda::is_emulated() &&
      is_complete)
    walk.missing.append(py::make_tuple(place.group_index, place.index));
  clocks_[at] = {slot.step,
                 static_cast<int32_t>(place.group_index),
                 slot.step_type == StepType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
                 true,
                 slot.is_first,
                 slot.is_fresh};
}

void Plan::read_step(const Place& place, Slot& slot) const {
  const double step = slot.step_type == StepType::kFloat32 ? double{*static_cast<float*>(slot.step)}
                      : slot.step_type == StepType::kFloat64
                          ? *static_cast<double*>(slot.step)
                          : static_cast<double>(*static_cast<int64_t*>(slot.step));
  constexpr double kTooLarge = 9.2e18;  // for the integers it becomes
  if (!(step >= 0 && step < kTooLarge) || step != std::floor(step))
    throw py::value_error("step of " + place.text() + " is " + std::to_string(step) +
                          ", but must be a whole number that is not negative; round it");
  slot.next_step = step + 1;
}

// Index of the scalars for a parameter at its next step.
int32_t Plan::schedule(Walk& walk, Group& group, const Slot& slot) const {
  const std::pair<double, bool> key(group.counts_steps ? slot.next_step : 0, slot.is_first);
  if (group.last_scalars >= 0 && key == group.last_key) return group.last_scalars;
  auto index = static_cast<int32_t>(walk.scalars.size());
  if (group.last_scalars >= 0) {  // the group has parameters at different steps
    group.scalars.emplace(group.last_key, group.last_scalars);
    index = group.scalars.emplace(key, index).first->second;
  }
  if (index == static_cast<int32_t>(walk.scalars.size())) {
    if (group.numbers_gpu >= 0) {  // a parameter on the CPU needs to know what is on the GPU
      GroupReader reader(group.dict.ptr(), &group - walk.groups.data(), /*leave_on_gpu=*/false);
      group.host_values = row_.read(reader).values;
    }
    walk.scalars.push_back(scalars_for(row_.rule, group.host_values, key, walk.grads));
    walk.scalars_keys.push_back({static_cast<size_t>(&group - walk.groups.data()), key});
  }
  group.last_key = key;
  return group.last_scalars = index;
}

// Computes the scalars again, now that walk.grads says what the norm is.
void Plan::rescale(Walk& walk) const {
  for (size_t i = 0; i < walk.scalars.size(); ++i) {
    const ScalarsKey& key = walk.scalars_keys[i];
    walk.scalars[i] =
        scalars_for(row_.rule, walk.groups[key.group].host_values, key.time, walk.grads);
  }
}

}  // namespace fusedopt
