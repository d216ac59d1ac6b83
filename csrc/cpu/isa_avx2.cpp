// The loops of the CPU driver, compiled for processors with AVX2, FMA and F16C.

#include "cpu/isa.h"
#include "cpu/isa_kernels.h"

namespace fusedopt::cpu {

const Kernels& kernels_avx2() { return kKernels; }

}  // namespace fusedopt::cpu
