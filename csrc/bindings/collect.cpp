#include <algorithm>
#include <cmath>

#include "bindings/fingerprint.h"
#include "bindings/memory.h"
#include "bindings/plan.h"

// The part of Plan that goes through the parameters: about half a microsecond for each.
namespace py = pybind11;

namespace fusedopt {
namespace {

// Raises TypeError for a value of the state that is no tensor.
[[noreturn]] void refuse_entry(const ParamId& id, PyObject* key, PyObject* value, bool is_step) {
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

// `key` holds the number of the step and whether the state is new.
Scalars scalars_for(RuleId rule, const HyperParams& hyper, std::pair<double, bool> key,
                    const GradInfo& grads) {
  const StepInfo info = {static_cast<uint64_t>(key.first), key.second};
  Scalars scalars;
  with_rule(rule, [&](auto of) {
    using Rule = decltype(of);
    scalars.set(fusedopt::step_scalars<Rule>(hyper, info, grads));
  });
  return scalars;
}

// What holds the rest of this param's weight. Params of 32 bits and more are their weights.
Master find_master(Master wanted, PyObject* param, const ParamId& id, References& held) {
  TensorView view;
  try {
    if (!read_tensor(param, view, held) || !view.is_supported) return Master::kNone;
  } catch (const UnknownTensorType&) {
    return Master::kNone;  // read_operand() will refuse it, by name
  }
  if (wanted == Master::kFloat32 && item_size(view.dtype) > 2) return Master::kNone;
  if (view.is_complex || (wanted == Master::kSplit && view.dtype != DType::kBFloat16))
    throw py::value_error(subject(id, "") + describe(param) + ", but master_weights='" +
                          (wanted == Master::kSplit ? "split' is for torch.bfloat16"
                                                    : "float32' is for real numbers") +
                          "; put it into a param group without");
  return wanted;
}

}  // namespace

void Plan::collect_params(StepContext& context) {
  size_t count = 0;
  for (const Group& group : context.groups)
    count += static_cast<size_t>(PyTuple_GET_SIZE(group.params.ptr()));
  if (count != updates_.size() || !is_collected_) {  // the last one may have ended anywhere
    updates_.resize(count);
    caches_.resize(count);
    for (ParamUpdate& update : updates_) update.layout = kDense;
    for (ParamCache& cache : caches_) cache.is_disjoint = false;
    chunked_ = disjoint_ = false;
  }
  is_collected_ = false;
  if (context.gpu_counts) counters_.assign(count, {});
  size_t at = 0;
  for (size_t g = 0; g < context.groups.size(); ++g) {
    Group& group = context.groups[g];
    const Py_ssize_t size = PyTuple_GET_SIZE(group.params.ptr());
    for (Py_ssize_t i = 0; i < size; ++i)
      collect_param(context, group, {group.dict.ptr(), static_cast<int64_t>(g), i}, at++);
  }
  dims_.swap(context.dims);
  is_collected_ = true;
}

void Plan::collect_param(StepContext& context, Group& group, const ParamId& id, size_t at) {
  ParamTensors found;
  PyObject* const param = PyTuple_GET_ITEM(group.params.ptr(), id.index);
  refuse_unless_tensor(param, id, "");
  PyObject* const grad = held_.hold(get_grad(param));
  if (grad != Py_None) refuse_unless_tensor(grad, id, "grad");
  found.tensors[kParam] = param;
  found.tensors[kGrad] = grad;
  found.state = find_state_dict(context, group, param, grad != Py_None, id);
  if (grad != Py_None) {
    name_states(group, id, found);
    found.is_complete = find_state(found.state, group, id, found);
    if (!found.is_complete && found.state != nullptr)
      refuse_partial(row_, group.states, found.state, id, /*is_checkpoint=*/false);
  }
  visit(context, group, id, found, at);
}

// The dict of a parameter's state, held, or nullptr. State was created in the order of the
// parameters, as a rule, so following the dict's order saves hashing (a Python call).
PyObject* Plan::find_state_dict(StepContext& context, const Group& group, PyObject* param,
                                bool active, const ParamId& id) {
  if (!group.has_state()) return nullptr;
  py::object state;
  if (!context.state_is_plain) {
    if (active) state = find_in_mapping(context.state, param);
  } else {
    if (!context.next_param)
      visit_entries(context.state, context.state_at, [&](PyObject* key, PyObject* value) {
        if (key == param)
          state = py::reinterpret_borrow<py::object>(value);
        else
          context.next_param = py::reinterpret_borrow<py::object>(key);
        return false;
      });
    else if (context.next_param.ptr() == param)
      context.next_param = py::object();
    if (!state && active) state = lookup(context.state, param);
  }
  if (!active || !state) return nullptr;
  if (PyDict_CheckExact(state.ptr())) return held_.hold(std::move(state));
  return held_.hold(as_dict(state.ptr(), ("the state of " + id.text()).c_str()));
}

void Plan::name_states(Group& group) const {
  for (int s = 0; s < kMaxStates; ++s)
    if ((group.states >> s & 1) != 0)
      group.names[kFirstState + s] = &row_.state_names[static_cast<size_t>(s)];
  if (group.master_weights != Master::kNone)
    group.names[kMaster] =
        group.master_weights == Master::kSplit ? &kParamRemainder : &kMasterParam;
  if (group.source.values.has_ema()) group.names[kEma] = &kEmaParam;
  for (const Key* const name : group.names) group.num_names += name != nullptr ? 1 : 0;
}

// The names of what is in use for this param: wide ones have no master weight.
void Plan::name_states(const Group& group, const ParamId& id, ParamTensors& found) {
  std::copy(std::begin(group.names), std::end(group.names), found.names);
  if (group.master_weights != Master::kNone)
    found.master = find_master(group.master_weights, found.tensors[kParam], id, held_);
  const bool lacks_master = found.names[kMaster] != nullptr && found.master == Master::kNone;
  if (lacks_master) found.names[kMaster] = nullptr;
  found.num_names = group.num_names - (lacks_master ? 1 : 0);
}

// Finds the tensors of a parameter's state in its dict; true if all that the step needs are there.
bool Plan::find_state(PyObject* state, const Group& group, const ParamId& id, ParamTensors& found) {
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
  if (bad_key != nullptr) refuse_entry(id, bad_key, bad_value, bad_key == step_key);
  if (left == 0) return true;

  const auto look_up = [&](PyObject* name) {
    const py::object value = lookup(state, name);
    if (value) take(name, value.ptr());
    if (bad_key != nullptr) refuse_entry(id, bad_key, bad_value, bad_key == step_key);
  };
  if (step_key != nullptr) look_up(step_key);
  for (const Key* const name : found.names)
    if (name != nullptr) look_up(name->object());
  return left == 0;
}

void Plan::visit(StepContext& context, Group& group, const ParamId& id, const ParamTensors& found,
                 size_t at) {
  ParamUpdate& update = updates_[at];
  ParamCache& cache = caches_[at];
  const bool active = found.tensors[kGrad] != Py_None;
  update.device = kIdle;
  // Of all params: where one process has no grad, others may.
  context.has_subclasses = context.has_subclasses || !is_plain(found.tensors[kParam]);
  if (!active) return keep_layout(context, update, cache);

  const bool is_known = found.is_complete &&
                        master_of(update.formats.dtypes[kMaster]) == found.master &&
                        cache.rounding == group.source.values.stochastic_rounding;
  const Unchanged unchanged = compare(found, is_known, update, cache);
  if (uses_less(update, cache, found, group) ||
      (unchanged == Unchanged::kNothing && has_unused_state(found, group)))
    changed_.append(py::make_tuple(id.group_index, id.index));
  if (unchanged != Unchanged::kAll) {
    Operands operands(id, held_);
    take_over(group, found, operands, cache);
    read_param_and_grad(operands, cache);
    const TensorView& grad = operands.views[kGrad];
    if (unchanged == Unchanged::kAllButGrad && update.formats.dtypes[kGrad] == grad.dtype &&
        is_contiguous(grad) && is_contiguous(operands.views[kParam]))
      update.data[kGrad] = grad.data;  // so check_grads() looks at it again
    else
      read_rest(context, operands, found.is_complete, update, cache);
    cache.recognizable = found.is_complete && update.layout == kDense;
  }
  if (!context.is_second) {
    const auto* const states = found.tensors + kFirstState;
    cache.is_first =
        group.states != 0 && std::count(states, states + kMaxStates, nullptr) == kMaxStates;
  }
  cache.is_fresh = cache.is_fresh || cache.is_first;
  update.device = cache.device;
  update.rule = row_.rule;
  update.variant = group.variant;
  update.norm_class = 0;
  if (update.device == kCpu)
    context.has_cpu = true;
  else
    note_gpu(context.gpus, update.device - kFirstGpu);
  if (update.device != kCpu && context.gpu_counts) {
    set_counter(context, group, id, found.is_complete, at);
  } else {
    if (group.counts_steps && found.is_complete && !cache.step_on_gpu) read_step(id, cache);
    update.scalars = step_scalars(context, group, cache);
  }
  context.has_gpu_counts = context.has_gpu_counts || cache.step_on_gpu;
  if (!cache.is_disjoint) disjoint_ = false;
  append(context.written.ptr(), found.tensors[kParam]);
}

// A parameter that rests this time: how its memory lay when it was checked is not forgotten.
void Plan::keep_layout(StepContext& context, ParamUpdate& update, ParamCache& cache) const {
  const Dims* const dims = dims_of(update);
  if (dims == nullptr || !cache.is_disjoint) {
    if (update.layout != kDense) cache.is_disjoint = false;
    update.layout = kDense;
    return;
  }
  update.layout = static_cast<int32_t>(context.dims.size());
  context.dims.push_back(*dims);
}

// Whether the options have changed so that the state is to lack something which it had in the step
// before.
bool Plan::uses_less(const ParamUpdate& update, const ParamCache& cache, const ParamTensors& found,
                     const Group& group) const {
  const auto had = [&](int k) { return update.formats.has(k) && found.names[k] == nullptr; };
  bool less =
      (cache.counts_steps && !group.counts_steps) || had(kEma) ||
      (update.formats.has(kMaster) && master_of(update.formats.dtypes[kMaster]) != found.master);
  for (int s = 0; s < kMaxStates; ++s)
    less = less || ((row_.omissible >> s & 1) != 0 && had(kFirstState + s));
  return less;
}

// Whether a state has what another setting has left there.
bool Plan::has_unused_state(const ParamTensors& found, const Group& group) const {
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

void Plan::take_over(const Group& group, const ParamTensors& found, Operands& operands,
                     ParamCache& cache) const {
  operands.step = found.step;
  operands.master = found.master;
  operands.rounding = cache.rounding = group.source.values.stochastic_rounding;
  if (cache.counts_steps && !group.counts_steps) {  // its count is gone, or will be
    cache.step = nullptr;
    cache.step_on_gpu = false;
  }
  cache.counts_steps = group.counts_steps;
  std::copy(std::begin(found.tensors), std::end(found.tensors), operands.tensors);
  for (int k = kFirstState; k < kMaxOperands; ++k)
    if (found.names[k] != nullptr) operands.names[k] = found.names[k]->name();
}

// What of a parameter's tensors is as it was in the step before, so that its update stands. A grad
// of the same form may lie anywhere: the update then points there.
Plan::Unchanged Plan::compare(const ParamTensors& found, bool is_known, ParamUpdate& update,
                              ParamCache& cache) const {
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
  PyObject* const grad = found.tensors[kGrad];
  const uint64_t form = is_plain(grad) ? form_fingerprint(grad) : kNoFingerprint;
  const bool same =
      is_known && cache.recognizable && all == cache.fingerprint && all != kNoFingerprint;
  const bool same_form = form == cache.grad_form && form != kNoFingerprint;
  cache.fingerprint = all;
  cache.grad_form = form;
  if (!same) return Unchanged::kNothing;
  char* const storage = same_form ? storage_data(grad) : nullptr;
  if (storage == nullptr) return Unchanged::kAllButGrad;
  update.data[kGrad] = storage + cache.grad_offset;
  return Unchanged::kAll;
}

// What the GPU needs to know to count a parameter's step.
void Plan::set_counter(StepContext& context, const Group& group, const ParamId& id,
                       bool is_complete, size_t at) {
  const ParamCache& cache = caches_[at];
  const int gpu = cache.device - kFirstGpu;
  if (group.scalars_gpu >= 0 && group.scalars_gpu != gpu)
    throw py::value_error("options of param group " + std::to_string(id.group_index) +
                          " are tensors on cuda:" + std::to_string(group.scalars_gpu) + ", but " +
                          id.text() + " is on cuda:" + std::to_string(gpu));
  // A count on the host is moved as one that is missing is created; where both are one there is
  // nothing to move.
  if (group.counts_steps && !cache.step_on_gpu && !context.is_second && !cuda::is_emulated() &&
      is_complete)
    context.missing.append(py::make_tuple(id.group_index, id.index));
  counters_[at] = {cache.step,
                   static_cast<int32_t>(id.group_index),
                   cache.step_type == StepType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
                   true,
                   cache.is_first,
                   cache.is_fresh};
}

void Plan::read_step(const ParamId& id, ParamCache& cache) const {
  const double step = cache.step_type == StepType::kFloat32
                          ? double{*static_cast<float*>(cache.step)}
                      : cache.step_type == StepType::kFloat64
                          ? *static_cast<double*>(cache.step)
                          : static_cast<double>(*static_cast<int64_t*>(cache.step));
  constexpr double kTooLarge = 9.2e18;  // for the integers it becomes
  if (!(step >= 0 && step < kTooLarge) || step != std::floor(step))
    throw py::value_error("step of " + id.text() + " is " + std::to_string(step) +
                          ", but must be a whole number that is not negative; round it");
  cache.next_step = step + 1;
}

// Index of the scalars for a parameter at its next step.
int32_t Plan::step_scalars(StepContext& context, Group& group, const ParamCache& cache) const {
  const std::pair<double, bool> key(group.counts_steps ? cache.next_step : 0, cache.is_first);
  if (group.last_scalars >= 0 && key == group.last_key) return group.last_scalars;
  auto index = static_cast<int32_t>(context.scalars.size());
  if (group.last_scalars >= 0) {  // the group has parameters at different steps
    group.scalars.emplace(group.last_key, group.last_scalars);
    index = group.scalars.emplace(key, index).first->second;
  }
  if (index == static_cast<int32_t>(context.scalars.size())) {
    if (group.scalars_gpu >= 0) {  // a parameter on the CPU needs to know what is on the GPU
      GroupReader reader(group.dict.ptr(), &group - context.groups.data(), /*leave_on_gpu=*/false);
      group.host_values = row_.read(reader).values;
    }
    context.scalars.push_back(scalars_for(row_.rule, group.host_values, key, context.grads));
    context.scalars_keys.push_back({static_cast<size_t>(&group - context.groups.data()), key});
  }
  group.last_key = key;
  return group.last_scalars = index;
}

// Computes the scalars again, now that context.grads says what the norm is.
void Plan::rescale(StepContext& context) const {
  for (size_t i = 0; i < context.scalars.size(); ++i) {
    const ScalarsKey& key = context.scalars_keys[i];
    context.scalars[i] =
        scalars_for(row_.rule, context.groups[key.group].host_values, key.info, context.grads);
  }
}

}  // namespace fusedopt
