#include "cuda/update.cuh"

namespace fusedopt::cuda {

template const void* update_kernel_of<Uniform<Float16>>(RuleId rule);

}  // namespace fusedopt::cuda
