// The loops of the CPU driver, compiled for processors with AVX-512.

#include "cpu/isa.h"
#include "cpu/isa_kernels.h"

namespace fusedopt::cpu {

const Kernels& kernels_avx512() { return kKernels; }

}  // namespace fusedopt::cpu
