// Compiles the emulated update kernels that compute in double.

#include "cuda/emulated_update.h"

namespace fusedopt::cuda {

template std::function<void()> emulated_update<double>(const UpdateCall& call);

}  // namespace fusedopt::cuda
