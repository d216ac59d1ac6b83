#include "cuda/update.cuh"

namespace fusedopt::cuda {

template const void* update_kernel_of<Uniform<float>>(RuleId rule);

}  // namespace fusedopt::cuda
