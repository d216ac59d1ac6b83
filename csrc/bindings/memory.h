#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bindings/python.h"
#include "bindings/torch_api.h"

// The one place that decides whether a tensor's memory may be read as it stands. A tensor may wrap
// another at any depth (a DTensor, a collective that is still under way), its memory may hold the
// negatives or conjugates of its values, or it may have none at all.
namespace fusedopt {

// A tensor subclass without memory of its own.
struct UnknownTensorType : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The tensor whose memory is that of `tensor`: itself, or what it wraps, which `held` keeps then.
// Waits for a pending collective. Raises UnknownTensorType for other wrappers.
PyObject* unwrap(PyObject* tensor, References& held);

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
