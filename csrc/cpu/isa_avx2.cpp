#include "cpu/isa.h"
#include "cpu/isa_kernels.h"

namespace fusedopt::cpu {

void run_chunk_avx2(const Step& step, int64_t chunk) { run_chunk_here(step, chunk); }

}  // namespace fusedopt::cpu
