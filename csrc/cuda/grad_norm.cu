#include "cuda/kernels.cuh"

// Sums of squares end in double, but begin in float for grads of at most 32 bits, and then
// subnormal numbers are flushed.
namespace fusedopt::cuda {

template const void* sum_squares_kernel_of<float>();
template const void* sum_squares_kernel_of<double>();

}  // namespace fusedopt::cuda
