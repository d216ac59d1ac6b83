// The one place that decides whether a tensor's memory may be read as it stands. A tensor may wrap
// another at any depth (a DTensor, a collective that is still under way), its memory may hold the
// negatives or conjugates of its values, or it may have none at all.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bindings/python.h"
#include "bindings/torch_api.h"

namespace fusedopt {

// A tensor subclass without memory of its own.
struct UnknownTensorType : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The tensor whose memory is that of `tensor`: itself, or what it wraps, which `held` keeps then.
// Waits for a pending collective. Raises UnknownTensorType for other wrappers.
PyObject* unwrap(PyObject* tensor, References& held);

// What can be told of a tensor without a call of a function in Python. Borrowed from it, or from
// `held`.
struct Shard {
  // The plain tensor that its values are in: itself, or what a DTensor has of it in this process;
  // nullptr if only unwrap() can tell.
  PyObject* tensor = nullptr;
  PyObject* spec = nullptr;  // a DTensor's layout over devices; torch makes a new one to change it
};
Shard find_shard(PyObject* tensor, References& held);

// Whether DTensors of these layouts lie alike over devices; false also where only Python can tell.
bool are_alike(PyObject* spec, PyObject* other);

// Whether and why memory does not hold the values of the tensor that unwrap() gave.
enum class Contents {
  kValues,
  kLazy,   // lazily negated or conjugated
  kZeros,  // torch has not made any memory for zeros that nobody may write to
  kFreed,  // there are elements, but their storage has been emptied
};
Contents contents_of(PyObject* memory, const TensorView& view);

// The same values in memory of their own, for kLazy and kZeros; a new reference.
pybind11::object materialize(PyObject* memory);

}  // namespace fusedopt
