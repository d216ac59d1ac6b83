// Compiles the update kernels that compute in double, which keep subnormal numbers.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* update_kernel_of<double>(RuleId id);

}  // namespace fusedopt::cuda
