// Compiles the kernels of the usual steps with codes (cuda/usual.h). They compute in float and
// flush subnormal numbers, as those of float.cu do.

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

template const void* usual_kernel_of<true>(RuleId id, int number);

}  // namespace fusedopt::cuda
