#include "bindings/operands.h"

#include "bindings/dlpack_abi.h"
#include "bindings/memory.h"
#include "core/step.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

std::string subject(const Operands& operands, int k) {
  return subject(operands.id, k == kParam ? "" : operands.names[k]->name());
}

[[noreturn]] void raise_unreadable(const Operands& operands, int k) {
  const py::handle tensor(operands.tensors[k]);
  const std::string what = subject(operands, k);
  if (tensor.attr("is_meta").cast<bool>())
    throw py::type_error(what + "on the meta device and has no values; materialize it first");
  if (py::str(tensor.attr("layout")).cast<std::string>() != "torch.strided")
    throw py::type_error(what + "sparse (" + std::string(py::str(tensor.attr("layout"))) +
                         "), but only dense tensors can be stepped" +
                         (k == kGrad ? "; use a dense grad (sparse=False in nn.Embedding), or "
                                       "SparseAdam for sparse grads"
                                     : ""));
  throw py::type_error(what + "a " + std::string(py::repr(py::type::of(tensor))) +
                       " whose memory torch does not export");
}

[[noreturn]] void raise_misfit(const Operands& operands, int k) {
  const bool mixes_complex = operands.views[k].is_complex != operands.views[kParam].is_complex;
  const std::string message =
      subject(operands, k) + describe(operands.tensors[k]) +
      ", which does not fit the parameter: " + describe(operands.tensors[kParam]);
  if (mixes_complex) throw py::type_error(message);
  throw py::value_error(message);
}

}  // namespace

std::string ParamId::text() const {
  const std::string where =
      "group " + std::to_string(group_index) + ", index " + std::to_string(index);
  const py::object names = lookup(group, py::str("param_names").ptr());
  if (names && py::isinstance<py::list>(names) && index < PyList_GET_SIZE(names.ptr()))
    return "parameter " + std::string(py::repr(names[py::int_(index)])) + " (" + where + ")";
  return "the parameter at " + where;
}

std::string subject(const ParamId& id, const std::string& name) {
  return (name.empty() ? "" : name + " of ") + id.text() + " is ";
}

void read_operand(Operands& operands, int k) {
  TensorView& view = operands.views[k];
  try {
    if (!read_tensor(operands.tensors[k], view, operands.held)) raise_unreadable(operands, k);
  } catch (const UnknownTensorType& error) {
    throw py::type_error(subject(operands, k) + error.what());
  }
  const bool is_remainder = k == kMaster && is_split(operands.master);
  // State dicts have its bits as bfloat16, and not all put them into the state by
  // load_state_dict(): torch.distributed.optim.ZeroRedundancyOptimizer does so itself.
  if (k == kMaster && operands.master == Master::kSplit && view.dtype == DType::kBFloat16)
    view.dtype = DType::kRemainder;
  if (operands.has_codes(k) && view.dtype == DType::kRemainder8) view.dtype = DType::kSignedCodes;
  const bool is_number = !is_split(master_of(view.dtype)) && !is_code(view.dtype);
  if (!view.is_supported || !(is_number || is_remainder || operands.has_codes(k)))
    throw py::type_error(subject(operands, k) + describe(operands.tensors[k]) +
                         ", but dtypes that can be stepped are float32, float64, bfloat16, "
                         "float16 and complex");
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (is_on_gpu(view) && address % static_cast<uintptr_t>(item_size(view.dtype)) != 0)
    throw py::value_error(subject(operands, k) + describe(operands.tensors[k]) +
                          " at an address that is no multiple of its elements' size, which GPUs "
                          "cannot access; clone() it first");
  const Contents contents = contents_of(view.memory, view);
  if (contents == Contents::kValues) return;
  if (contents == Contents::kFreed)
    throw py::value_error(subject(operands, k) + "without memory: its storage has been emptied");
  if (k == kGrad) {
    operands.tensors[k] = operands.held.hold(materialize(view.memory));
    return read_operand(operands, k);
  }
  throw py::value_error(subject(operands, k) +
                        (contents == Contents::kLazy
                             ? "lazily conjugated or negated, so that its memory does not hold its "
                               "values; call resolve_conj() or resolve_neg() first"
                             : "a tensor of zeros without memory; clone() it first"));
}

void check_against_param(const Operands& operands, int k) {
  const TensorView& view = operands.views[k];
  const TensorView& param = operands.views[kParam];
  // Whoever has found the rows has seen that they are the param's.
  const bool is_of_rows = k == kGrad && operands.rows != nullptr;
  if ((is_of_rows || same_shape(view, param)) && view.device_type == param.device_type &&
      view.device_id == param.device_id && view.is_complex == param.is_complex)
    return;
  raise_misfit(operands, k);
}

void check_master(const Operands& operands) {
  if (operands.views[kMaster].dtype == dtype_of(operands.master)) return;
  const char* const dtype = operands.master == Master::kSplit    ? "torch.int16"
                            : operands.master == Master::kSplit8 ? "torch.int8"
                                                                 : "torch.float32";
  throw py::type_error(subject(operands, kMaster) + describe(operands.tensors[kMaster]) +
                       ", but must be " + dtype);
}

void check_codes(const Operands& operands, int k, DType kind) {
  const TensorView& codes = operands.views[k];
  if (codes.dtype != kind)
    throw py::type_error(subject(operands, k) + describe(operands.tensors[k]) + ", but must be " +
                         (kind == DType::kSignedCodes ? "torch.int8" : "torch.uint8"));
  const int at = scale_of_state(k);
  const TensorView& scales = operands.views[at];
  const TensorView& param = operands.views[kParam];
  if (scales.dtype != DType::kFloat32 || scales.is_complex ||
      count_elements(scales) != num_groups(count_elements(codes)) ||
      scales.device_type != param.device_type || scales.device_id != param.device_id)
    throw py::value_error(subject(operands, at) + describe(operands.tensors[at]) +
                          ", but must be torch.float32, one number for " + std::to_string(kGroup) +
                          " elements, beside the parameter: " + describe(operands.tensors[kParam]));
  if (!is_contiguous(codes) || !is_contiguous(scales))
    throw py::value_error(subject(operands, is_contiguous(codes) ? at : k) +
                          "not contiguous, as codes and their scales must be; load_state_dict() "
                          "makes them that");
}

uint8_t find_device(const Operands& operands) {
  const TensorView& view = operands.views[kParam];
  if (is_on_gpu(view) && cuda::unavailable_reason() == nullptr && view.device_id < kMaxGpus)
    return static_cast<uint8_t>(kFirstGpu + view.device_id);
  if (view.device_type == kDlCpu) return kCpu;
  const std::string message = subject(operands, kParam) + describe(operands.tensors[kParam]);
  if (is_on_gpu(view) && cuda::unavailable_reason() != nullptr)
    throw std::runtime_error(message + ", but " + cuda::unavailable_reason());
  throw std::runtime_error(message + ", a device that fusedopt does not step");
}

Dims make_dims(const Operands& operands, bool has_draws) {
  const TensorView& param = operands.views[kParam];
  const int64_t parts = param.is_complex ? 2 : 1;
  Dims dims;
  for (int32_t d = 0; d < param.ndim; ++d) {
    Dim dim = {param.shape[d], {}};
    for (int k = 0; k < kMaxOperands; ++k)
      if (operands.has(k)) dim.strides[k] = operands.views[k].strides[d] * parts;
    dims.push_back(dim);
  }
  if (has_draws) {
    int64_t stride = 1;
    for (size_t d = dims.size(); d-- > 0; stride *= dims[d].size) dims[d].strides[kIndex] = stride;
  }
  if (param.is_complex) {
    Dim dim = {2, {}};
    for (int k = 0; k < kMaxOperands; ++k) dim.strides[k] = operands.has(k) ? 1 : 0;
    dims.push_back(dim);
  }
  return dims;
}

}  // namespace fusedopt
