// What the bindings know of torch: tensors as seen through DLPack, and functions of torch, of which
// a step calls a few for every parameter. No torch header and no torch library is involved.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "bindings/python.h"
#include "core/dtypes.h"
#include "core/gpu.h"

namespace fusedopt {

struct TensorView {
  void* data;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  int32_t ndim;
  int32_t device_type;  // DLPack's number
  int32_t device_id;
  DType dtype;  // of the real numbers
  bool is_complex;
  bool is_int64;
  bool is_supported;  // false: dtype is none of ours (integers, 8-bit floats ...)
  PyObject* memory;   // the tensor that was described: itself or what it wraps; borrowed
};

// Looks torch's functions up; call once, when the module is imported. Raises if torch lacks them.
void connect_to_torch();

// Reads the description of a tensor, or of what it wraps: see bindings/memory.h, whose
// UnknownTensorType it raises. False, without a Python error, if torch cannot describe it (sparse
// and meta tensors). Valid until the tensor is changed.
bool read_tensor(PyObject* tensor, TensorView& view, References& held);

bool is_tensor(PyObject* object);

// A torch.dtype, as far as it matters for weights: kFloat64 stands for integers, too.
struct TorchDType {
  DType dtype;  // of the real numbers
  bool is_complex;
};
TorchDType read_torch_dtype(const pybind11::object& dtype);

// The torch.dtype, borrowed, that states are to have by a group's `state_dtype`, which is that or
// its name; nullptr for what states cannot be of.
PyObject* find_state_dtype(PyObject* value);

// Its name, or None.
pybind11::object state_dtype_name(const pybind11::object& value);

// Whether that is "q8", codes of 8 bits, in which states are that can be; others are float32.
bool is_q8(PyObject* state_dtype);

std::string allowed_state_dtypes();  // for messages

// `count` int64 numbers on a GPU, or on the CPU if `gpu` is below 0; a tensor of its own.
pybind11::object new_numbers(int gpu, int64_t count, int64_t*& data);

// The same with the status of a norm that the caller knows, a number or a tensor of one element, of
// grads that are still multiplied by `scale`: GradStatus, whose `fields` are as
// GradNorm::status_fields() describes them. `found_inf`: None, or a tensor that may ask for the
// step to be skipped.
pybind11::object new_status(int gpu, int64_t count, const pybind11::dict& fields,
                            const pybind11::object& norm, const pybind11::object& scale,
                            const pybind11::object& found_inf);

// What all devices' and processes' sums, a NormSums of each class, add up to: a tensor for each of
// `sums`, on its device. `reductions`: as classify_params() gave them; what these add up to is
// added up over `norm_groups`. Processes meet on the device of `param`.
pybind11::list combine_sums(const pybind11::list& sums, const pybind11::object& reductions,
                            const pybind11::list& norm_groups, pybind11::handle param);

// (class of each param's grad in the global norm, what combine_sums() needs to know of them).
pybind11::tuple classify_params(const pybind11::list& params);

int64_t* data_of_numbers(pybind11::handle numbers);

bool is_on_gpu(const TensorView& view);

// A cudaStream_t: torch's current stream of that GPU.
void* current_stream(int gpu);

// Memory that torch allocates and gets back when it is no longer used.
std::shared_ptr<void> allocate(int gpu, int64_t bytes, cuda::Memory kind);

// Pointer to the float32 value of a one-element tensor, as it is on the GPU; `tensor` is replaced
// by a copy there if need be.
const float* float_on_gpu(pybind11::object& tensor, int gpu);

bool is_plain(PyObject* tensor);  // torch.Tensor or Parameter itself, no subclass

// tensor.grad.
pybind11::object get_grad(PyObject* tensor);

// torch's answers, of a tensor that wraps no other.
bool is_negated(PyObject* tensor);
bool is_conjugated(PyObject* tensor);
bool is_zero_tensor(PyObject* tensor);

// How tensors of a type wrap others: what fusedopt._tensors.wrapping() says.
pybind11::tuple ask_wrapping(const pybind11::object& tensor_type);

// (values, row numbers) of the rows that a grad is of (fusedopt/_tensors.py).
pybind11::tuple hit_rows(PyObject* grad, PyObject* param);

// A grad (or state) as it fits the param's layout over devices: itself, or what a DTensor's
// redistribute() returns. Costs a call into Python; not for plain tensors.
pybind11::object align(PyObject* tensor, PyObject* param);

// Of a DTensor: the number in the whole tensor of the first element that this process has. Costs a
// call into Python.
int64_t find_first_element(PyObject* tensor);

bool same_shape(const TensorView& a, const TensorView& b);
bool is_contiguous(const TensorView& view);
int64_t count_elements(const TensorView& view);  // a complex element counts once

// How often a tensor and what it wraps have been written to, as autograd counts it; below 0 for
// inference tensors.
int64_t count_writes(PyObject* tensor, References& held);

// Tells autograd that the tensors in the list have been written to.
void increment_versions(PyObject* list_of_tensors);

// "torch.float32 of shape (2, 3) on cpu", for messages.
std::string describe(PyObject* tensor);

}  // namespace fusedopt
