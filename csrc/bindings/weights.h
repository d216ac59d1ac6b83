// Weights in two parts (core/weight.h), outside of steps: all of a tensor at once, contiguous and
// in memory of the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/torch_api.h"

namespace fusedopt {

// Raises ValueError for a tensor that is not as said above, or of another dtype.
TensorView view_on_cpu(pybind11::handle tensor, DType dtype, References& held);

// weight <- the float32 numbers that bfloat16 params and their int16 or int8 remainders are
// together.
void join_weights(pybind11::handle param, pybind11::handle remainder, pybind11::handle weight);

// param, remainder <- the two parts of float32 weights.
void split_weights(pybind11::handle weight, pybind11::handle param, pybind11::handle remainder);

}  // namespace fusedopt
