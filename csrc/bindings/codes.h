// Codes of 8 bits (core/codes.h), outside of steps: all of a tensor at once, contiguous and in
// memory of the CPU. Signed codes are int8, the others uint8; there is a float32 scale for each 64.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedopt {

// codes, scales <- the nearest codes of float32 values.
void encode(pybind11::handle values, pybind11::handle codes, pybind11::handle scales);

// values <- the float32 numbers that codes stand for.
void decode(pybind11::handle codes, pybind11::handle scales, pybind11::handle values);

}  // namespace fusedopt
