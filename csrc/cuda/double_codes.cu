// Compiles the update kernels for states that are codes (core/codes.h) which compute in double.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* codes_kernel_of<double>(RuleId id);

}  // namespace fusedopt::cuda
