#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"
#include "cuda/tuning.h"

// Accesses to device memory. Written out for the device: a compiler that is left to itself splits
// some of the wide ones into single words, and finds out at run time what kind of memory it is.
namespace fusedopt::cuda {

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t words[kWords];
};

template <class T>
FUSEDOPT_HD T load_item(const T* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no such access");
#if defined(__CUDA_ARCH__)
  const size_t address = __cvta_generic_to_global(from);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(address));
    return bit_cast<T>(bits);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(address));
    return bit_cast<T>(bits);
  } else {
    uint64_t bits;
    asm("ld.global.u64 %0, [%1];" : "=l"(bits) : "l"(address));
    return bit_cast<T>(bits);
  }
#else
  return *from;
#endif
}

template <class T>
FUSEDOPT_HD void store_item(T* to, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no such access");
#if defined(__CUDA_ARCH__)
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (sizeof(T) == 2)
    asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(bit_cast<uint16_t>(value))
                 : "memory");
  else if constexpr (sizeof(T) == 4)
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(bit_cast<uint32_t>(value))
                 : "memory");
  else
    asm volatile("st.global.u64 [%0], %1;" ::"l"(address), "l"(bit_cast<uint64_t>(value))
                 : "memory");
#else
  *to = value;
#endif
}

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
