#include <algorithm>

#include "bindings/dlpack_abi.h"
#include "bindings/fingerprint.h"
#include "bindings/memory.h"
#include "bindings/plan.h"

// The part of Plan that reads and checks tensors which are not what they were in the step before,
// and enters them into the update.
namespace py = pybind11;

namespace fusedopt {
namespace {

void check_alignment(const Operands& operands, int k) {
  const py::object aligned = align(operands.tensors[k], operands.tensors[kParam]);
  if (aligned.ptr() != operands.tensors[k])
    throw py::value_error(subject(operands.id, operands.names[k]) +
                          "laid out over devices unlike its parameter");
}

template <class T>
void note(T& field, T value, bool& unchanged) {
  unchanged = unchanged && field == value;
  field = value;
}

}  // namespace

void Plan::read_param_and_grad(Operands& operands, ParamCache& cache) {
  cache.recognizable = false;  // until all of its tensors have been read and checked
  read_operand(operands, kParam);
  const uint8_t device = find_device(operands);
  if (device != cache.device) chunked_ = cache.is_disjoint = false;
  cache.device = device;
  if (!is_plain(operands.tensors[kParam]) || !is_plain(operands.tensors[kGrad]))
    align_grad(operands);
  PyObject* const grad = operands.tensors[kGrad];
  read_operand(operands, kGrad);
  if (operands.tensors[kGrad] != grad) cache.grad_form = kNoFingerprint;  // a copy of it
  const char* const data = static_cast<char*>(operands.views[kGrad].data);
  if (cache.grad_form != kNoFingerprint)  // DLPack has a null pointer for tensors without elements
    cache.grad_offset = data != nullptr ? data - storage_data(grad) : 0;
  check_against_param(operands, kGrad);
  if (operands.rounding == StochasticRounding::kAll &&
      operands.views[kParam].dtype == DType::kFloat16)
    throw py::value_error(subject(operands.id, "") + describe(operands.tensors[kParam]) +
                          ", but stochastic_rounding=True is for torch.bfloat16; put it into a "
                          "param group without");
}

void Plan::align_grad(Operands& operands) const {
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

// Reads and checks the state and enters all operands into the update.
void Plan::read_rest(StepContext& context, Operands& operands, bool found, ParamUpdate& update,
                     ParamCache& cache) {
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
    const bool is_other = update.data[k] != operands.views[k].data;
    if (k < kMaster && is_other && !context.is_second) cache.is_fresh = false;  // it was loaded
    if (!cache.counts_steps && is_other) {
      cache.step = nullptr;  // it belonged to another state
      cache.step_on_gpu = false;
    }
    if (!is_plain(operands.tensors[k])) check_alignment(operands, k);
  }
  if (operands.step != nullptr) find_step(operands, cache);
  if (!found) context.missing.append(py::make_tuple(operands.id.group_index, operands.id.index));
  fill(context, operands, update, cache);
}

// Finds the memory of a step count.
void Plan::find_step(const Operands& operands, ParamCache& cache) const {
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
  cache.step_type = is_int                          ? StepType::kInt64
                    : view.dtype == DType::kFloat32 ? StepType::kFloat32
                                                    : StepType::kFloat64;
  cache.step_on_gpu = view.device_type != kDlCpu;
}

// Which operands are rounded stochastically: a bit for each. The average of a bfloat16 param is
// float32; a param with a master weight is no more than its nearest bfloat16.
uint8_t Plan::rounded_stochastically(const Operands& operands) const {
  unsigned wanted = 0;
  if (operands.rounding == StochasticRounding::kAll)
    wanted = (1u << kMaster) - 1 - (1u << kGrad) - (operands.has(kMaster) ? 1u << kParam : 0);
  if (operands.rounding == StochasticRounding::kSecondMoments)
    wanted = second_moments_ << kFirstState;
  unsigned rounded = 0;
  for (int k = 0; k < kMaster; ++k)
    if (operands.has(k) && operands.views[k].dtype == DType::kBFloat16) rounded |= 1u << k;
  return static_cast<uint8_t>(rounded & wanted);
}

// Enters the operands into the update and notices what is not where it was.
void Plan::fill(StepContext& context, const Operands& operands, ParamUpdate& update,
                ParamCache& cache) {
  const TensorView& param = operands.views[kParam];
  bool same_memory = true, same_size = true;
  note(update.numel, count_elements(param) * (param.is_complex ? 2 : 1), same_size);
  update.formats.stochastic = rounded_stochastically(operands);
  bool same_grad = true;
  for (int k = 0; k < kMaxOperands; ++k) {
    bool& same = k == kGrad ? same_grad : same_memory;
    const bool is_there = operands.has(k);
    note(update.data[k], is_there ? operands.views[k].data : nullptr, same);
    note(update.formats.dtypes[k], is_there ? operands.views[k].dtype : DType::kAbsent, same);
  }
  const Dims* const before = dims_of(update);
  lay_out(context, operands, update);
  const Dims* const now =
      update.layout == kDense ? nullptr : &context.dims[static_cast<size_t>(update.layout)];
  const bool same_layout = before == nullptr ? now == nullptr : now != nullptr && *before == *now;
  cache.is_disjoint = cache.is_disjoint && same_memory && same_size && same_layout;
  if (!same_grad || !cache.is_disjoint) cache.checked_grad = nullptr;
  chunked_ = chunked_ && same_size;
}

void Plan::lay_out(StepContext& context, const Operands& operands, ParamUpdate& update) const {
  bool contiguous = true;
  unsigned present = 0;
  for (int k = 0; k < kMaxOperands; ++k) {
    if (!operands.has(k)) continue;
    contiguous = contiguous && is_contiguous(operands.views[k]);
    present |= 1u << k;
  }
  update.layout = kDense;
  if (contiguous) return;
  Dims dims = make_dims(operands, update.formats.stochastic != 0);
  coalesce(dims);
  if (is_dense(dims, present)) return;
  update.layout = static_cast<int32_t>(context.dims.size());
  context.dims.push_back(std::move(dims));
}

}  // namespace fusedopt
