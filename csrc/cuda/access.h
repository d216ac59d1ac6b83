#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/bits.h"
#include "core/dtypes.h"
#include "core/macros.h"
#include "core/step.h"

// Accesses to memory, and conversions of two numbers at once. The compiler is told that pointers
// are into global memory: else it finds out at run time, for each access. What goes through shared
// memory is written out, since it does not know what copies do there meanwhile.
namespace fusedopt::cuda {

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t words[kWords];
};

template <class T>
FUSEDOPT_HD T load_item(const T* from) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(from));
#endif
  return *from;
}

template <class T>
FUSEDOPT_HD void store_item(T* to, T value) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(to));
#endif
  *to = value;
}

// In one access.
template <int kWords>
FUSEDOPT_HD Words<kWords> load_words(const void* from) {
  return load_item(static_cast<const Words<kWords>*>(from));
}

template <int kWords>
FUSEDOPT_HD void store_words(void* to, const Words<kWords>& from) {
  store_item(static_cast<Words<kWords>*>(to), from);
}

// A place in a block's shared memory.
#if defined(__CUDA_ARCH__)
using SharedPlace = uint32_t;
FUSEDOPT_HD SharedPlace shared_place(void* data) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(data));
}
#else
using SharedPlace = char*;
inline SharedPlace shared_place(void* data) { return static_cast<char*>(data); }
#endif

// Starts a copy to shared memory if `condition` is not 0, without a branch. It is done once
// wait_for_copies() says so.
template <int kBytes>
FUSEDOPT_HD void start_copy_if(uint32_t condition, SharedPlace to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "no such copy");
#if defined(__CUDA_ARCH__)
  const size_t address = __cvta_generic_to_global(from);
  if constexpr (kBytes == 16)
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::
            "r"(to),
        "l"(address), "r"(condition)
        : "memory");
  else
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], %3; }" ::
            "r"(to),
        "l"(address), "r"(condition), "n"(kBytes)
        : "memory");
#else
  if (condition != 0) memcpy(to, from, kBytes);
#endif
}

// Ends a group of copies.
FUSEDOPT_HD void end_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups of this thread are done but the latest `kPending`.
template <int kPending>
FUSEDOPT_HD void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

template <int kWords>
FUSEDOPT_HD Words<kWords> load_shared(SharedPlace from) {
  static_assert(kWords == 1 || kWords == 4, "no such access");
#if defined(__CUDA_ARCH__)
  Words<kWords> to;
  uint32_t* const w = to.words;
  if constexpr (kWords == 4)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(from));
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[0]) : "r"(from));
  return to;
#else
  Words<kWords> to;
  memcpy(&to, from, sizeof(to));
  return to;
#endif
}

FUSEDOPT_HD void store_shared(SharedPlace to, uint32_t word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
#else
  memcpy(to, &word, sizeof(word));
#endif
}

// What all threads of a warp find the same, so that the compiler knows it: it is kept once for all
// of them, and what depends on it is no divergent branch.
template <class T>
FUSEDOPT_HD T same_for_warp(T value) {
#if defined(__CUDA_ARCH__)
  struct {
    uint32_t all[sizeof(T) / 4];
  } words;
  memcpy(&words, &value, sizeof(words));
  for (uint32_t& word : words.all) word = __shfl_sync(0xffffffffu, word, 0);
  return bit_cast<T>(words);
#else
  return value;
#endif
}

// The same number, of which the compiler does not know that it is: what follows from it is found
// out again where it is needed. To keep all that over a loop would take dozens of registers.
template <class T>
FUSEDOPT_HD T opaque(T number) {
  asm volatile("" : "+r"(number));
  return number;
}

// The bytes of two words from byte `at` of the first on, at < 4.
FUSEDOPT_HD uint32_t word_across(uint32_t first, uint32_t second, uint32_t at) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(first, second, 8 * at);
#else
  return static_cast<uint32_t>((uint64_t{second} << 32 | first) >> (8 * at));
#endif
}

// Two halves of 16 bits; what lies above them in the arguments does not count.
FUSEDOPT_HD uint32_t word_of(uint32_t low, uint32_t high) { return (low & 0xffffu) | high << 16; }

// Two numbers in a format of 16 bits.
template <class Storage>
FUSEDOPT_HD uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<Storage, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  Storage halves[2];
  store(halves[0], low);
  store(halves[1], high);
  return word_of(halves[0].bits, halves[1].bits);
#endif
}

// A work in a few accesses, all asked for at once.
FUSEDOPT_HD ParamUpdate load_update(const ParamUpdate* from) {
  constexpr int kParts = sizeof(ParamUpdate) / sizeof(Words<4>);
  struct {
    Words<4> parts[kParts];
  } update;
  for (int i = 0; i < kParts; ++i)
    update.parts[i] = load_words<4>(reinterpret_cast<const Words<4>*>(from) + i);
  return bit_cast<ParamUpdate>(update);
}

}  // namespace fusedopt::cuda
