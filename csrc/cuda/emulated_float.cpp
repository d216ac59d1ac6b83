// Compiles the emulated update kernels that compute in float.

#include "cuda/emulated_update.h"

namespace fusedopt::cuda {

template std::function<void()> emulated_update<float>(const UpdateCall& call);

}  // namespace fusedopt::cuda
