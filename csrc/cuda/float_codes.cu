// Compiles the update kernels for states that are codes (core/codes.h) which compute in float and
// flush subnormal numbers, as those of float.cu do.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* codes_kernel_of<float>(RuleId id);

}  // namespace fusedopt::cuda
