#include "bindings/torch_api.h"

#include <algorithm>
#include <unordered_map>

#include "bindings/dlpack_abi.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Filled by connect_to_torch() and read from then on. The references live as long as the process.
struct Torch {
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  int (*describe)(void*, DLTensor*) = nullptr;
  int (*current_stream)(int32_t, int32_t, void**) = nullptr;
  PyObject* increment_version = nullptr;
  PyObject* local_attribute = nullptr;  // of fusedopt._tensors
  PyObject* align = nullptr;            // of fusedopt._tensors
  PyObject* allocate = nullptr;         // of fusedopt._tensors
  PyObject* new_numbers = nullptr;      // of fusedopt._norms
  PyObject* combine_totals = nullptr;   // of fusedopt._norms
  PyObject* classify = nullptr;         // of fusedopt._norms
  PyObject* float32 = nullptr;
  PyObject* bfloat16 = nullptr;
  PyObject* float_on_gpu = nullptr;  // of fusedopt._tensors
  PyObject* grad_name = nullptr;
  PyGetSetDef* grad = nullptr;  // TensorBase.grad, to be called without a lookup per tensor
  PyCFunction is_neg = nullptr;
  PyCFunction is_conj = nullptr;
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
  return reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method->ml_meth;
}

PyObject* keep(py::object object) { return object.release().ptr(); }

bool call_flag(PyCFunction method, PyObject* tensor) {
  const py::object result = py::reinterpret_steal<py::object>(method(tensor, nullptr));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

// The tensor that holds the memory: itself, or the local part of a DTensor. Borrowed. Which it is
// depends on the type alone and is asked once per type.
PyObject* local_part(PyObject* tensor) {
  static auto* const attributes = new std::unordered_map<PyTypeObject*, PyObject*>();
  auto found = attributes->find(Py_TYPE(tensor));
  if (found == attributes->end()) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    py::object name;
    try {
      name = py::handle(g_torch.local_attribute)(py::handle(type));
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      throw UnknownTensorType(py::str(error.value()));
    }
    Py_INCREF(type);
    found = attributes->emplace(Py_TYPE(tensor), name.release().ptr()).first;
  }
  if (found->second == Py_None) return tensor;
  const auto local = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, found->second));
  if (!local) throw py::error_already_set();
  return local.ptr();  // `tensor` holds it
}

bool read_dtype(DLDataType dtype, TensorView& view) {
  view.is_complex = dtype.code == kDlComplex;
  const int bits = view.is_complex ? dtype.bits / 2 : dtype.bits;
  if (dtype.lanes != 1) return false;
  if (dtype.code == kDlBfloat && bits == 16) {
    view.dtype = DType::kBFloat16;
    return true;
  }
  if (dtype.code == kDlInt && bits == 16) {
    view.dtype = DType::kRemainder;
    return true;
  }
  if (dtype.code != kDlFloat && dtype.code != kDlComplex) return false;
  view.dtype = bits == 64 ? DType::kFloat64 : bits == 32 ? DType::kFloat32 : DType::kFloat16;
  return bits == 64 || bits == 32 || bits == 16;
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
  g_torch.local_attribute = keep(py::module_::import("fusedopt._tensors").attr("local_attribute"));
  g_torch.align = keep(py::module_::import("fusedopt._tensors").attr("align"));
  g_torch.allocate = keep(py::module_::import("fusedopt._tensors").attr("allocate"));
  g_torch.float_on_gpu = keep(py::module_::import("fusedopt._tensors").attr("float_on_gpu"));
  const auto norms = py::module_::import("fusedopt._norms");
  g_torch.new_numbers = keep(norms.attr("new_numbers"));
  g_torch.combine_totals = keep(norms.attr("combine_totals"));
  g_torch.classify = keep(norms.attr("classify"));
  g_torch.float32 = keep(torch.attr("float32"));
  g_torch.bfloat16 = keep(torch.attr("bfloat16"));
  g_torch.grad_name = PyUnicode_InternFromString("grad");
  g_torch.grad = attribute_of(base, "grad");
  g_torch.is_neg = method_of(base, "is_neg");
  g_torch.is_conj = method_of(base, "is_conj");
}

bool read_tensor(PyObject* tensor, TensorView& view) {
  if (!is_plain(tensor)) tensor = local_part(tensor);
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

bool is_state_dtype(PyObject* dtype) {
  return dtype == g_torch.float32 || dtype == g_torch.bfloat16;
}

py::object new_numbers(int gpu, int64_t count, double*& data) {
  py::object numbers = py::handle(g_torch.new_numbers)(gpu, count, cuda::is_emulated());
  data = const_cast<double*>(data_of_numbers(numbers));
  return numbers;
}

const double* data_of_numbers(py::handle numbers) {
  DLTensor dl;
  if (g_torch.describe(numbers.ptr(), &dl) != 0) throw py::error_already_set();
  return reinterpret_cast<const double*>(static_cast<char*>(dl.data) + dl.byte_offset);
}

py::list combine_totals(const py::list& totals, const py::object& reductions) {
  return py::handle(g_torch.combine_totals)(totals, reductions);
}

py::tuple classify(const py::list& param_groups) {
  return py::handle(g_torch.classify)(param_groups);
}

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
  py::object tensor = py::handle(g_torch.allocate)(gpu, bytes, name, cuda::is_emulated());
  DLTensor dl;
  if (g_torch.describe(tensor.ptr(), &dl) != 0) throw py::error_already_set();
  void* const data = static_cast<char*>(dl.data) + dl.byte_offset;
  return std::shared_ptr<void>(data, [owner = tensor.release().ptr()](void*) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(owner);
  });
}

const float* float_on_gpu(py::object& tensor, int gpu) {
  tensor = py::handle(g_torch.float_on_gpu)(tensor, gpu, cuda::is_emulated());
  TensorView view;
  if (!read_tensor(tensor.ptr(), view) || count_elements(view) != 1)
    throw py::value_error("found_inf and grad_scale must be tensors of one element");
  return static_cast<const float*>(view.data);
}

bool is_plain(PyObject* tensor) {
  return Py_TYPE(tensor) == g_torch.parameter_type || Py_TYPE(tensor) == g_torch.tensor_type;
}

PyObject* get_grad(PyObject* tensor) {
  PyObject* const grad = is_plain(tensor) ? g_torch.grad->get(tensor, g_torch.grad->closure)
                                          : PyObject_GetAttr(tensor, g_torch.grad_name);
  if (grad == nullptr) throw py::error_already_set();
  return grad;
}

bool is_lazy(PyObject* tensor, const TensorView& view) {
  // torch's public functions negate lazily in imag() of a conjugated tensor only: strides of two,
  // or few elements. Asking of every tensor would cost as much as all else that is done for it.
  if (!view.is_complex && is_contiguous(view) && count_elements(view) > 1) return false;
  if (!is_plain(tensor)) tensor = local_part(tensor);
  return call_flag(g_torch.is_neg, tensor) ||
         (view.is_complex && call_flag(g_torch.is_conj, tensor));
}

PyObject* align(PyObject* tensor, PyObject* param) {
  return py::handle(g_torch.align)(py::handle(tensor), py::handle(param)).release().ptr();
}

PyObject* materialize(PyObject* tensor) {
  return py::handle(tensor).attr("resolve_conj")().attr("resolve_neg")().release().ptr();
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

void increment_versions(PyObject* list_of_tensors) {
  py::handle(g_torch.increment_version)(py::handle(list_of_tensors));
}

std::string describe(PyObject* tensor) {
  const py::handle t(tensor);
  return py::str("{} of shape {} on {}")
      .format(t.attr("dtype"), py::tuple(t.attr("shape")), t.attr("device"));
}

}  // namespace fusedopt
