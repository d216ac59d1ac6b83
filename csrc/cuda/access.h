#pragma once

#include <cstdint>

#include "core/macros.h"
#include "cuda/tuning.h"

// Accesses to device memory of 4, 8 or 16 bytes at once. Written out for the device: a compiler
// that is left to itself splits some of them into single words.
namespace fusedopt::cuda {

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t words[kWords];
};

template <int kWords>
FUSEDOPT_HD Words<kWords> load_words(const void* from) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "no such access");
#if defined(__CUDA_ARCH__)
  Words<kWords> to;
  uint32_t* const w = to.words;
  const size_t address = __cvta_generic_to_global(from);
  if constexpr (kWords == 4 && kStreamLoads)
    asm("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
        : "l"(address));
  else if constexpr (kWords == 4)
    asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
        : "l"(address));
  else if constexpr (kWords == 2)
    asm("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(address));
  else
    asm("ld.global.u32 %0, [%1];" : "=r"(w[0]) : "l"(address));
  return to;
#else
  return *static_cast<const Words<kWords>*>(from);
#endif
}

template <int kWords>
FUSEDOPT_HD void store_words(void* to, const Words<kWords>& from) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "no such access");
#if defined(__CUDA_ARCH__)
  const uint32_t* const w = from.words;
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (kWords == 4 && kStreamStores)
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  else if constexpr (kWords == 4)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  else if constexpr (kWords == 2)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(w[0]), "r"(w[1])
                 : "memory");
  else
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(w[0]) : "memory");
#else
  *static_cast<Words<kWords>*>(to) = from;
#endif
}

}  // namespace fusedopt::cuda
