// Compiles the kernels that sum the squares of grads, in float for grads of at most 32 bits. As all
// computation in float, this flushes subnormal numbers: the build compiles this file, like
// float.cu, with the flag that makes a GPU do so. It does not concern double.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* sum_squares_kernel_of<float>();
template const void* sum_squares_kernel_of<double>();

}  // namespace fusedopt::cuda
