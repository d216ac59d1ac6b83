#include "bindings/torch_api.h"

#include <algorithm>

#include "bindings/dlpack_abi.h"
#include "bindings/fingerprint.h"
#include "bindings/memory.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// What states may be of: the only list.
struct StateDtype {
  const char* name;  // torch's, too, but for codes
  const char* dtype_name;
  PyObject* dtype = nullptr;
};
constexpr char kQ8[] = "q8";

// Filled by connect_to_torch() and read from then on. The references live as long as the process.
struct Torch {
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  int (*describe)(void*, DLTensor*) = nullptr;
  int (*current_stream)(int32_t, int32_t, void**) = nullptr;
  PyObject* increment_version = nullptr;
  PyObject* wrapping = nullptr;       // of fusedopt._tensors
  PyObject* align = nullptr;          // of fusedopt._tensors
  PyObject* hit_rows = nullptr;       // of fusedopt._tensors
  PyObject* first_element = nullptr;  // of fusedopt._tensors
  PyObject* allocate = nullptr;       // of fusedopt._tensors
  PyObject* count_writes = nullptr;   // of fusedopt._tensors
  PyObject* new_numbers = nullptr;    // of fusedopt._norms
  PyObject* new_status = nullptr;     // of fusedopt._norms
  PyObject* combine_sums = nullptr;   // of fusedopt._norms
  PyObject* classify = nullptr;       // of fusedopt._norms
  PyObject* bfloat16 = nullptr;
  StateDtype state_dtypes[3] = {{"float32", "float32"}, {"bfloat16", "bfloat16"}, {kQ8, "float32"}};
  PyObject* float_on_gpu = nullptr;  // of fusedopt._tensors
  PyObject* grad_name = nullptr;
  PyGetSetDef* grad = nullptr;  // TensorBase.grad, to be called without a lookup per tensor
  PyCFunction is_neg = nullptr;
  PyCFunction is_conj = nullptr;
  PyCFunction is_zerotensor = nullptr;
};

Torch g_torch;

// The C functions behind an attribute of torch's tensor type.
PyGetSetDef* attribute_of(const py::object& type, const char* name) {
  const py::object attribute = type.attr(name);
  if (!PyObject_TypeCheck(attribute.ptr(), &PyGetSetDescr_Type))
    throw std::runtime_error(std::string("torch's Tensor.") + name + " is not a C attribute");
  return reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr())->d_getset;
}

// The C function behind a method without arguments of torch's tensor type.
PyCFunction method_of(const py::object& type, const char* name) {
  const py::object method = type.attr(name);
  if (!PyObject_TypeCheck(method.ptr(), &PyMethodDescr_Type))
    throw std::runtime_error(std::string("torch's Tensor.") + name + " is not a C method");
  const PyMethodDef& found = *reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
  if ((found.ml_flags & METH_NOARGS) == 0)
    throw std::runtime_error(std::string("torch's Tensor.") + name + " takes arguments");
  return found.ml_meth;
}

PyObject* keep(py::object object) { return object.release().ptr(); }

bool call_flag(PyCFunction method, PyObject* tensor) {
  const py::object result = py::reinterpret_steal<py::object>(method(tensor, nullptr));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

bool read_dtype(DLDataType dtype, TensorView& view) {
  view.is_complex = dtype.code == kDlComplex;
  view.dtype = DType::kAbsent;
  view.is_int64 = dtype.code == kDlInt && dtype.bits == 64 && dtype.lanes == 1;
  const int bits = view.is_complex ? dtype.bits / 2 : dtype.bits;
  if (dtype.lanes != 1) return false;
  if (dtype.code == kDlBfloat && bits == 16) {
    view.dtype = DType::kBFloat16;
    return true;
  }
  if (dtype.code == kDlInt && (bits == 16 || bits == 8)) {
    view.dtype = bits == 16 ? DType::kRemainder : DType::kRemainder8;
    return true;
  }
  if (dtype.code == kDlUInt && bits == 8) {
    view.dtype = DType::kPositiveCodes;
    return true;
  }
  if (dtype.code != kDlFloat && dtype.code != kDlComplex) return false;
  view.dtype = bits == 64 ? DType::kFloat64 : bits == 32 ? DType::kFloat32 : DType::kFloat16;
  return bits == 64 || bits == 32 || bits == 16;
}

const StateDtype* look_up_state_dtype(PyObject* value) {
  for (const StateDtype& each : g_torch.state_dtypes)
    if (value == each.dtype ||
        (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, each.name) == 0))
      return &each;
  return nullptr;
}

// What torch calls that GPU, or the CPU for a negative number; emulated GPUs are the CPU.
std::string torch_device(int gpu) {
  return gpu < 0 || cuda::is_emulated() ? "cpu" : "cuda:" + std::to_string(gpu);
}

char* data_of(py::handle tensor) {
  DLTensor dl;
  if (g_torch.describe(tensor.ptr(), &dl) != 0) throw py::error_already_set();
  return static_cast<char*>(dl.data) + dl.byte_offset;
}

}  // namespace

void connect_to_torch() {
  const auto torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  const py::object parameter = torch.attr("nn").attr("Parameter");
  const py::object base = torch.attr("_C").attr("TensorBase");
  const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.version.major != kDlpackMajor || !api->dltensor_from_py_object_no_sync)
    throw std::runtime_error("this torch exports tensors through an unknown version of DLPack");
  g_torch.describe = api->dltensor_from_py_object_no_sync;
  g_torch.current_stream = api->current_work_stream;
  g_torch.tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  g_torch.parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  g_torch.increment_version = keep(torch.attr("autograd").attr("graph").attr("increment_version"));
  const auto tensors = py::module_::import("fusedopt._tensors");
  g_torch.wrapping = keep(tensors.attr("wrapping"));
  g_torch.align = keep(tensors.attr("align"));
  g_torch.hit_rows = keep(tensors.attr("hit_rows"));
  g_torch.first_element = keep(tensors.attr("first_element"));
  g_torch.allocate = keep(tensors.attr("allocate"));
  g_torch.count_writes = keep(tensors.attr("count_writes"));
  g_torch.float_on_gpu = keep(tensors.attr("float_on_gpu"));
  const auto norms = py::module_::import("fusedopt._norms");
  g_torch.new_numbers = keep(norms.attr("new_numbers"));
  g_torch.new_status = keep(norms.attr("new_status"));
  g_torch.combine_sums = keep(norms.attr("combine_sums"));
  g_torch.classify = keep(norms.attr("classify"));
  g_torch.bfloat16 = keep(torch.attr("bfloat16"));
  for (StateDtype& each : g_torch.state_dtypes) each.dtype = keep(torch.attr(each.dtype_name));
  g_torch.grad_name = PyUnicode_InternFromString("grad");
  g_torch.grad = attribute_of(base, "grad");
  g_torch.is_neg = method_of(base, "is_neg");
  g_torch.is_conj = method_of(base, "is_conj");
  g_torch.is_zerotensor = method_of(base, "_is_zerotensor");
}

bool read_tensor(PyObject* tensor, TensorView& view, References& held) {
  if (!is_plain(tensor)) tensor = unwrap(tensor, held);
  view.memory = tensor;
  DLTensor dl;
  if (g_torch.describe(tensor, &dl) != 0) {
    PyErr_Clear();
    return false;
  }
  view.data = static_cast<char*>(dl.data) + dl.byte_offset;
  view.shape = dl.shape;
  view.strides = dl.strides;
  view.ndim = dl.ndim;
  view.device_type = dl.device.device_type;
  view.device_id = dl.device.device_id;
  view.is_supported = read_dtype(dl.dtype, view);
  return true;
}

bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, g_torch.tensor_type); }

PyObject* find_state_dtype(PyObject* value) {
  const StateDtype* const found = look_up_state_dtype(value);
  return found == nullptr ? nullptr : found->dtype;
}

py::object state_dtype_name(const py::object& value) {
  const StateDtype* const found = look_up_state_dtype(value.ptr());
  return found == nullptr ? py::object(py::none()) : py::str(found->name);
}

bool is_q8(PyObject* state_dtype) {
  const StateDtype* const found = look_up_state_dtype(state_dtype);
  return found != nullptr && found->name == kQ8;
}

std::string allowed_state_dtypes() {
  std::string allowed;
  for (const StateDtype& each : g_torch.state_dtypes)
    allowed += (each.name == kQ8 ? "" : "torch." + std::string(each.name) + ", ") + "'" +
               each.name + "', ";
  return allowed + "or None";
}

TorchDType read_torch_dtype(const py::object& dtype) {
  const bool is_complex = dtype.attr("is_complex").cast<bool>();
  const auto bytes = dtype.attr("itemsize").cast<int>() / (is_complex ? 2 : 1);
  if (dtype.ptr() == g_torch.bfloat16) return {DType::kBFloat16, false};
  if (!is_complex && !dtype.attr("is_floating_point").cast<bool>()) return {DType::kFloat64, false};
  return {bytes == 2   ? DType::kFloat16
          : bytes == 4 ? DType::kFloat32
                       : DType::kFloat64,
          is_complex};
}

py::object new_numbers(int gpu, int64_t count, int64_t*& data) {
  py::object numbers = py::handle(g_torch.new_numbers)(torch_device(gpu), count);
  data = data_of_numbers(numbers);
  return numbers;
}

py::object new_status(int gpu, int64_t count, const py::dict& fields, const py::object& norm,
                      const py::object& scale, const py::object& found_inf) {
  return py::handle(g_torch.new_status)(torch_device(gpu), count, fields, norm, scale, found_inf);
}

int64_t* data_of_numbers(py::handle numbers) {
  return reinterpret_cast<int64_t*>(data_of(numbers));
}

py::list combine_sums(const py::list& sums, const py::object& reductions,
                      const py::list& norm_groups, py::handle param) {
  return py::handle(g_torch.combine_sums)(sums, reductions, norm_groups, param);
}

py::tuple classify_params(const py::list& params) { return py::handle(g_torch.classify)(params); }

bool is_on_gpu(const TensorView& view) {
  return view.device_type == kDlCuda || (view.device_type == kDlCpu && cuda::is_emulated());
}

void* current_stream(int gpu) {
  void* stream = nullptr;
  if (cuda::is_emulated()) return stream;
  if (g_torch.current_stream == nullptr || g_torch.current_stream(kDlCuda, gpu, &stream) != 0) {
    PyErr_Clear();
    throw std::runtime_error("torch does not tell its current stream on cuda:" +
                             std::to_string(gpu));
  }
  return stream;
}

std::shared_ptr<void> allocate(int gpu, int64_t bytes, cuda::Memory kind) {
  const char* const name = kind == cuda::Memory::kDevice       ? "device"
                           : kind == cuda::Memory::kPageLocked ? "page-locked"
                                                               : "zeros";
  py::object tensor = py::handle(g_torch.allocate)(torch_device(gpu), bytes, name);
  void* const data = data_of(tensor);
  return std::shared_ptr<void>(data, [owner = tensor.release().ptr()](void*) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(owner);
  });
}

const float* float_on_gpu(py::object& tensor, int gpu) {
  tensor = py::handle(g_torch.float_on_gpu)(tensor, torch_device(gpu));
  TensorView view;
  References held;
  if (!read_tensor(tensor.ptr(), view, held) || count_elements(view) != 1)
    throw py::value_error("found_inf and grad_scale must be tensors of one element");
  return static_cast<const float*>(view.data);
}

bool is_plain(PyObject* tensor) {
  return Py_TYPE(tensor) == g_torch.parameter_type || Py_TYPE(tensor) == g_torch.tensor_type;
}

py::object get_grad(PyObject* tensor) {
  PyObject* const grad = is_plain(tensor) ? g_torch.grad->get(tensor, g_torch.grad->closure)
                                          : PyObject_GetAttr(tensor, g_torch.grad_name);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

bool is_negated(PyObject* tensor) { return call_flag(g_torch.is_neg, tensor); }

bool is_conjugated(PyObject* tensor) { return call_flag(g_torch.is_conj, tensor); }

bool is_zero_tensor(PyObject* tensor) { return call_flag(g_torch.is_zerotensor, tensor); }

py::tuple ask_wrapping(const py::object& tensor_type) {
  return py::handle(g_torch.wrapping)(tensor_type);
}

py::object align(PyObject* tensor, PyObject* param) {
  return py::handle(g_torch.align)(py::handle(tensor), py::handle(param));
}

py::tuple hit_rows(PyObject* grad, PyObject* param) {
  return py::handle(g_torch.hit_rows)(py::handle(grad), py::handle(param));
}

int64_t find_first_element(PyObject* tensor) {
  return py::handle(g_torch.first_element)(py::handle(tensor)).cast<int64_t>();
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

bool is_contiguous(const TensorView& view) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] == 0) return true;
    if (view.shape[d] != 1 && view.strides[d] != expected) contiguous = false;
    expected *= view.shape[d];
  }
  return contiguous;
}

int64_t count_elements(const TensorView& view) {
  int64_t count = 1;
  for (int32_t d = 0; d < view.ndim; ++d) count *= view.shape[d];
  return count;
}

int64_t count_writes(PyObject* tensor, References& held) {
  if (!has_versions()) return py::handle(g_torch.count_writes)(py::handle(tensor)).cast<int64_t>();
  PyObject* const inner = is_plain(tensor) ? tensor : unwrap(tensor, held);
  const int64_t own = find_version(tensor), of_inner = inner != tensor ? find_version(inner) : 0;
  return own < 0 || of_inner < 0 ? -1 : own + of_inner;
}

void increment_versions(PyObject* list_of_tensors) {
  py::handle(g_torch.increment_version)(py::handle(list_of_tensors));
}

std::string describe(PyObject* tensor) {
  const py::handle t(tensor);
  return py::str("{} of shape {} on {}")
      .format(t.attr("dtype"), py::tuple(t.attr("shape")), t.attr("device"));
}

}  // namespace fusedopt
