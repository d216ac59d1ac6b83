#pragma once

// The one macro of the core. It marks functions that the host and the device share. They are always
// inlined, so that every instruction set gets its own copy: of several out-of-line copies the
// linker keeps one, which could be one built with AVX-512, on a machine without it.
#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif
