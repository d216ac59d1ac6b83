// Compiles the update kernels that compute in float. They flush subnormal numbers to zero, as float
// computation does everywhere in the library (core/flush.h): the build has a flag for this file.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* update_kernel_of<float>(RuleId id);

}  // namespace fusedopt::cuda
