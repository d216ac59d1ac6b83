// The loops of the CPU driver, compiled for every processor of the architecture.

#include "cpu/isa.h"
#include "cpu/isa_kernels.h"

namespace fusedopt::cpu {

const Kernels& kernels_baseline() { return kKernels; }

}  // namespace fusedopt::cpu
