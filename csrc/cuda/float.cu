#include "cuda/kernels.cuh"

// The build has these flush subnormal numbers, as computation in float does everywhere.
namespace fusedopt::cuda {

template const void* update_kernel_of<float>(RuleId id);

}  // namespace fusedopt::cuda
