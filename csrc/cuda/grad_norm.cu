// Compiles the kernels that sum the squares of grads. Sums begin in float for grads of at most 32
// bits, and end in double. As all computation in float, they flush subnormal numbers: the build
// compiles this file, like float.cu, with the flag that makes a GPU do so.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* sum_squares_kernel_of<float>();
template const void* sum_squares_kernel_of<double>();

}  // namespace fusedopt::cuda
