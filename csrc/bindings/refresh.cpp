#include <algorithm>

#include "bindings/collect.h"
#include "bindings/dlpack_abi.h"
#include "bindings/fingerprint.h"
#include "bindings/memory.h"

// The part of Collector that reads and checks tensors which are not what they were in the step
// before, and enters them into the update.
namespace py = pybind11;

namespace fusedopt {
namespace {

void check_alignment(const Operands& operands, int k) {
  if (are_alike(operands.shards[k].spec, operands.shards[kParam].spec) &&
      operands.shards[k].spec != nullptr)
    return;
  const std::string what = subject(operands.id, operands.names[k]->name());
  if ((operands.shards[k].spec == nullptr) != (operands.shards[kParam].spec == nullptr))
    throw py::type_error(what + describe(operands.tensors[k]) +
                         ": it and its parameter must both be DTensors, or neither of them");
  if (align(operands.tensors[k], operands.tensors[kParam]).ptr() != operands.tensors[k])
    throw py::value_error(what + "laid out over devices unlike its parameter");
}

void align_grad(Operands& operands) {
  if (operands.shards[kGrad].spec != nullptr && operands.is_grad_alike) return;
  PyObject* const grad = operands.tensors[kGrad];
  read_operand(operands, kGrad);
  try {
    operands.tensors[kGrad] = operands.held.hold(align(grad, operands.tensors[kParam]));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    throw py::type_error(subject(operands.id, "grad") + describe(grad) + ": " +
                         std::string(py::str(error.value())));
  }
}

// Finds the memory of a step count.
void find_step(const Operands& operands, ParamCache& cache) {
  TensorView view;
  const TensorView& param = operands.views[kParam];
  // Only where it is needed: the words take longer than the reading.
  const auto subject_of_step = [&] { return subject(operands.id, "step"); };
  bool readable = false;
  try {
    readable = read_tensor(operands.step, view, operands.held);
  } catch (const UnknownTensorType& error) {
    throw py::type_error(subject_of_step() + error.what());
  }
  if (readable && contents_of(view.memory, view) != Contents::kValues)
    throw py::value_error(subject_of_step() +
                          "a tensor whose memory does not hold its value; clone() it first");
  const bool is_on_cpu = readable && view.device_type == kDlCpu;
  const bool is_beside_param =
      readable && view.device_type == param.device_type && view.device_id == param.device_id;
  const bool is_float =
      readable && view.is_supported && !view.is_complex && item_size(view.dtype) >= 4;
  // The GPU counts floating-point steps only.
  const bool is_int = is_on_cpu && view.is_int64 && !is_on_gpu(param);
  const bool usable = (is_float && (is_on_cpu || is_beside_param)) || is_int;
  if (!usable || count_elements(view) != 1)
    throw py::value_error(subject_of_step() + describe(operands.step) +
                          ", but must be one float32 or float64 number on the CPU or on the "
                          "parameter's device; load_state_dict() makes it that");
  cache.step = view.data;
  cache.step_type = is_int                          ? ParamCache::StepType::kInt64
                    : view.dtype == DType::kFloat32 ? ParamCache::StepType::kFloat32
                                                    : ParamCache::StepType::kFloat64;
  cache.step_on_gpu = view.device_type != kDlCpu;
}

template <class T>
void assign(T& field, T value, bool& unchanged) {
  unchanged = unchanged && field == value;
  field = value;
}

}  // namespace

void Collector::refresh(const Group& group, bool is_second, Unchanged unchanged, Operands& operands,
                        ParamUpdate& update, ParamCache& cache) {
  cache.rounding = operands.rounding;
  if (cache.counts_steps && !group.options.counts_steps) {  // its count is gone, or will be
    cache.step = nullptr;
    cache.step_on_gpu = false;
  }
  cache.counts_steps = group.options.counts_steps;
  if (unchanged == Unchanged::kNothing) refuse_both_forms(group, operands);
  read_param_and_grad(operands, cache);
  const TensorView& grad = operands.views[kGrad];
  if (unchanged == Unchanged::kAllButGrad && update.formats.dtypes[kGrad] == grad.dtype &&
      is_contiguous(grad) && is_contiguous(operands.views[kParam])) {
    update.data[kGrad] = grad.data;  // so AliasCheck looks at it again
  } else {
    read_state(is_second, operands, update, cache);
    enter(operands, update, cache);
  }
  cache.recognizable = operands.is_complete && update.layout == kDense;
}

// Raises ValueError for a state that is there in numbers and in codes, as one of them is not kept
// up.
void Collector::refuse_both_forms(const Group& group, const Operands& operands) const {
  if (operands.state == nullptr) return;
  for (int s = 0; s < kMaxStates; ++s) {
    const Key* const numbers = group.options.names[kFirstState + s];
    if (numbers == nullptr || !row_.can_be_codes(s)) continue;
    const auto at = static_cast<size_t>(s);
    for (const Key* other : {&row_.code_names[at], &row_.scale_names[at]})
      if (lookup(operands.state, numbers->object()) && lookup(operands.state, other->object()))
        throw py::value_error("the state of " + operands.id.text() + " has both '" +
                              numbers->name() + "' and '" + other->name() +
                              "', of which steps keep one up; delete the other");
  }
}

void Collector::read_param_and_grad(Operands& operands, ParamCache& cache) {
  read_operand(operands, kParam);
  const uint8_t device = find_device(operands);
  if (device != cache.device) table_.is_chunked = cache.is_disjoint = false;
  cache.device = device;
  if (!is_plain(operands.tensors[kParam]) || !is_plain(operands.tensors[kGrad]))
    align_grad(operands);
  read_operand(operands, kGrad);
  // Another tensor has been read, or there is no memory: nothing can be told from the grad's form.
  PyObject* const shard = operands.shards[kGrad].tensor;
  if (operands.views[kGrad].memory != shard || storage_data(shard) == nullptr)
    cache.grad_form = kNoFingerprint;
  const char* const data = static_cast<char*>(operands.views[kGrad].data);
  if (cache.grad_form != kNoFingerprint)  // DLPack has a null pointer for tensors without elements
    cache.grad_offset = data != nullptr ? data - storage_data(shard) : 0;
  check_against_param(operands, kGrad);
  if (operands.rounding == StochasticRounding::kAll &&
      operands.views[kParam].dtype == DType::kFloat16)
    throw py::value_error(subject(operands.id, "") + describe(operands.tensors[kParam]) +
                          ", but stochastic_rounding=True is for torch.bfloat16; put it into a "
                          "param group without");
}

// Reads and checks the state.
void Collector::read_state(bool is_second, Operands& operands, const ParamUpdate& update,
                           ParamCache& cache) const {
  for (int k = kFirstState; k < kMaxOperands; ++k) {
    if (!operands.has(k)) continue;
    if (operands.tensors[k] == nullptr) {
      cache.step_on_gpu = false;
      operands.views[k] = operands.views[kParam];  // as it will be
      operands.views[k].data = nullptr;
      continue;
    }
    read_operand(operands, k);
    check_against_param(operands, k);
    if (k == kMaster) check_master(operands);
    if (operands.has_codes(k)) {
      read_operand(operands, scale_of_state(k));
      const bool are_signed = (row_.signed_codes >> (k - kFirstState) & 1) != 0;
      check_codes(operands, k, are_signed ? DType::kSignedCodes : DType::kPositiveCodes);
    }
    const bool is_other = update.data[k] != operands.views[k].data;
    if (k < kMaster && is_other && !is_second) cache.is_fresh = false;  // it was loaded
    if (!cache.counts_steps && is_other) {
      cache.step = nullptr;  // it belonged to another state
      cache.step_on_gpu = false;
    }
    for (const int each : {k, operands.has_codes(k) ? scale_of_state(k) : k})
      if (!is_plain(operands.tensors[each]) || operands.shards[kParam].spec != nullptr)
        check_alignment(operands, each);
  }
  if (operands.step != nullptr) find_step(operands, cache);
}

// Which operands are rounded stochastically: a bit for each. The average of a bfloat16 param is
// float32; a param with a master weight is no more than its nearest bfloat16, but a weight of 24
// bits is rounded to them, which is noted at its remainder.
uint8_t Collector::rounded_stochastically(const Operands& operands) const {
  unsigned wanted = 0;
  if (operands.rounding == StochasticRounding::kAll)
    wanted = (1u << kMaster) - 1 - (1u << kGrad) - (operands.has(kMaster) ? 1u << kParam : 0);
  if (operands.rounding == StochasticRounding::kSecondMoments)
    wanted = row_.second_moments << kFirstState;
  unsigned rounded = 0;
  for (int k = 0; k < kMaster; ++k) {
    if (!operands.has(k)) continue;
    const DType dtype = operands.views[k].dtype;
    if (dtype == DType::kBFloat16) rounded |= 1u << k;
    if (is_code(dtype) && operands.draws_codes) {
      rounded |= 1u << k;
      wanted |= 1u << k;
    }
  }
  const bool is_cut = rounds_remainder(operands.master, operands.rounding);
  return static_cast<uint8_t>((rounded & wanted) | (is_cut ? 1u << kMaster : 0));
}

// Enters the operands into the update and notices what is not where it was.
void Collector::enter(const Operands& operands, ParamUpdate& update, ParamCache& cache) {
  const TensorView& param = operands.views[kParam];
  bool same_memory = true, same_size = true, same_grad = true;
  const TensorView& whole = operands.rows != nullptr ? operands.views[kGrad] : param;
  assign(update.numel, count_elements(whole) * (param.is_complex ? 2 : 1), same_size);
  update.formats.stochastic = rounded_stochastically(operands);
  for (int k = 0; k < kMaxOperands; ++k) {
    bool& same = k == kGrad ? same_grad : same_memory;
    const bool is_there = operands.has(k);
    assign(update.data[k], is_there ? operands.views[k].data : nullptr, same);
    assign(update.formats.dtypes[k], is_there ? operands.views[k].dtype : DType::kAbsent, same);
  }
  for (int s = 0; s < kMaxStates; ++s) {
    const int scale = kFirstScale + s;
    const bool is_there = operands.has(scale) && operands.tensors[scale] != nullptr;
    float* const data = is_there ? static_cast<float*>(operands.views[scale].data) : nullptr;
    assign(update.scales[s], data, same_memory);
  }
  const Dims* const before = table_.dims_of(update);
  lay_out(operands, update);
  const Dims* const now =
      update.layout == kDense ? nullptr : &dims_[static_cast<size_t>(update.layout)];
  const bool same_layout = before == nullptr ? now == nullptr : now != nullptr && *before == *now;
  cache.is_disjoint = cache.is_disjoint && same_memory && same_size && same_layout;
  if (!same_grad || !cache.is_disjoint) cache.checked_grad = nullptr;
  table_.is_chunked = table_.is_chunked && same_size;
}

void Collector::lay_out(const Operands& operands, ParamUpdate& update) {
  bool contiguous = true;
  unsigned present = 0;
  for (int k = 0; k < kMaxOperands; ++k) {
    if (!operands.has(k)) continue;
    contiguous = contiguous && is_contiguous(operands.views[k]);
    present |= 1u << k;
  }
  update.layout = kDense;
  const bool has_draws = update.formats.stochastic != 0;
  const bool is_part = has_draws && operands.shards[kParam].spec != nullptr;
  const bool is_known = is_part && operands.has_known_specs && update.first_element > 0;
  if (!is_known) update.first_element = is_part ? find_first_element(operands.tensors[kParam]) : 0;
  const bool can_be_dense = !has_draws || has_whole_draw_blocks(update.first_element, update.numel);
  if (contiguous && can_be_dense && operands.rows == nullptr) return;
  Dims dims = make_dims(operands, has_draws);
  if (operands.rows != nullptr) return lay_out_rows(operands, update, std::move(dims));
  coalesce(dims, /*keeps_order=*/update.formats.has_codes());
  if (can_be_dense && is_dense(dims, present)) return;
  add_layout(update, std::move(dims), {});
}

// The dim of the rows stays the outermost one, whatever its stride.
void Collector::lay_out_rows(const Operands& operands, ParamUpdate& update, Dims dims) {
  Dims inner(dims.begin() + 1, dims.end());
  coalesce(inner);
  if (inner.empty()) inner.push_back({1, {}});
  dims.resize(1);
  dims.insert(dims.end(), inner.begin(), inner.end());
  add_layout(update, std::move(dims), {data_of_numbers(operands.rows), operands.num_rows});
}

void Collector::add_layout(ParamUpdate& update, Dims dims, Rows rows) {
  update.layout = static_cast<int32_t>(dims_.size());
  dims_.push_back(std::move(dims));
  rows_.push_back(rows);
}

}  // namespace fusedopt
