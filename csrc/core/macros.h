#pragma once

// The one macro of the core: a function of single elements that the host and the device share.
// Always inlined, so that every instruction set gets a copy of its own: an out-of-line copy built
// with AVX-512 could otherwise be the one the linker keeps for a machine without it.
#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif
