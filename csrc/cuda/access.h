// Accesses to global and shared memory, and other things that take an instruction of the GPU: the
// one file of the driver where host and device differ. Each function has a plain C++ version for
// the emulation.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/bits.h"
#include "core/branch_free.h"
#include "core/codes.h"
#include "core/dtypes.h"
#include "core/macros.h"
#include "core/step.h"

namespace fusedopt::cuda {

// Words that are loaded and stored in one access.
template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t words[kWords];
};

// Pointers that are loaded from memory could be into any address space, and generic accesses find
// out which at run time, for each access. __builtin_assume tells the compiler that these are into
// global memory.
template <class T>
FUSEDOPT_HD T load_item(const T* from) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(from));
#endif
  return *from;
}

// The emulation's threads run one after the other, but some values are what several of them say,
// and none of these may store before all have read. So a block's threads run twice: first in
// rehearsal, in which what they say is written down, then with the answers; and what they store is
// kept until the end.
struct LaneTalk {
  struct Store {
    void* to;
    size_t size;
    char bytes[16];
  };
  // Of one thread, what it says among the lanes of a whole warp, and what among fewer.
  struct Said {
    std::vector<uint32_t> values[2];
    size_t next[2] = {0, 0};
  };

  bool is_rehearsal = true;
  uint32_t thread = 0;
  std::vector<Said> said;
  std::vector<Store> stores = {};
};
#if !defined(__CUDA_ARCH__)
inline __thread LaneTalk* lane_talk = nullptr;
#endif

template <class T>
FUSEDOPT_HD void store_item(T* to, T value) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(to));
#else
  if (lane_talk != nullptr) {
    if (lane_talk->is_rehearsal) return;
    LaneTalk::Store later = {to, sizeof(value), {}};
    memcpy(later.bytes, &value, sizeof(value));
    return lane_talk->stores.push_back(later);
  }
#endif
  *to = value;
}

// The largest of what so many neighbouring lanes of a warp say, 8, 16 or 32 of them, which begin
// at a multiple of that. All of the warp must call it, and what those lanes have read before, none
// of them has yet written.
FUSEDOPT_HD uint32_t largest_of_lanes(uint32_t value, uint32_t lanes) {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#pragma unroll
  for (uint32_t width = 1; width < 32; width *= 2)
    if (width < 8 || width < lanes) value = max(value, __shfl_xor_sync(0xffffffffu, value, width));
  return value;
#else
  LaneTalk& talk = *lane_talk;
  const int who = lanes == 32 ? 0 : 1;
  if (talk.is_rehearsal) {
    talk.said[talk.thread].values[who].push_back(value);
    return value;
  }
  const size_t at = talk.said[talk.thread].next[who]++;
  const uint32_t first = talk.thread & ~(lanes - 1);
  for (uint32_t other = first; other < first + lanes; ++other) {
    const uint32_t others = talk.said[other].values[who].at(at);  // throws if it has said nothing
    value = others > value ? others : value;
  }
  return value;
#endif
}

// In one access, of up to 16 bytes. The address is a multiple of the size.
template <int kWords>
FUSEDOPT_HD Words<kWords> load_words(const void* from) {
  return load_item(static_cast<const Words<kWords>*>(from));
}

template <int kWords>
FUSEDOPT_HD void store_words(void* to, const Words<kWords>& from) {
  store_item(static_cast<Words<kWords>*>(to), from);
}

// Adds to a number in global memory that other threads add to as well.
FUSEDOPT_HD void add_to(int64_t& to, int64_t value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(&to), static_cast<unsigned long long>(value));
#else
  to += value;
#endif
}

// A place in a block's shared memory: on the device a 32-bit address within it, which takes one
// register where a pointer takes two.
#if defined(__CUDA_ARCH__)
using SharedPlace = uint32_t;
FUSEDOPT_HD SharedPlace shared_place(void* data) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(data));
}
#else
using SharedPlace = char*;
inline SharedPlace shared_place(void* data) { return static_cast<char*>(data); }
#endif

// Starts an asynchronous copy from global to shared memory if `condition` is not 0. The instruction
// is predicated, which takes no branch. The bytes have arrived once wait_for_copies() returns.
// Copies of 16 bytes bypass the L1 cache (cp.async.cg); smaller ones cannot (cp.async.ca).
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

// Makes a group of the copies that this thread has started since its last group.
FUSEDOPT_HD void end_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all groups of this thread are done but the latest `kPending`. What other threads have
// copied may still be under way.
template <int kPending>
FUSEDOPT_HD void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Accesses to shared memory are volatile assembly, which the compiler keeps in order with the
// copies: it does not know what these write, and might move an ordinary load before the wait. With
// `kAgain`, the load takes place although the bytes have been loaded before: else the assembler
// would hold these in registers for it.
template <bool kAgain = false>
FUSEDOPT_HD Words<4> load_shared(SharedPlace from) {
#if defined(__CUDA_ARCH__)
  Words<4> to;
  uint32_t* const w = to.words;
  if constexpr (kAgain)
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(from));
  else
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(from));
  return to;
#else
  Words<4> to;
  memcpy(&to, from, sizeof(to));
  return to;
#endif
}

FUSEDOPT_HD void store_shared(SharedPlace to, const Words<4>& from) {
#if defined(__CUDA_ARCH__)
  const uint32_t* const w = from.words;
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
#else
  memcpy(to, &from, sizeof(from));
#endif
}

// A value that is the same in all threads of a warp, taken from the first of them, so that the
// compiler knows it. It is then kept in uniform registers, once for the warp, and branches that
// depend on it do not diverge. All 32 threads must call it.
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

// The same number, but the compiler cannot tell. It then computes what follows from the number
// where it is needed. Otherwise it would compute all of that before a loop and keep it over the
// loop, which would take dozens of registers.
template <class T>
FUSEDOPT_HD T opaque(T number) {
  asm volatile("" : "+r"(number));
  return number;
}

// The four bytes of two neighbouring words from byte `at` of the first on, with at < 4: one funnel
// shift on a GPU.
FUSEDOPT_HD uint32_t word_across(uint32_t first, uint32_t second, uint32_t at) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(first, second, 8 * at);
#else
  return static_cast<uint32_t>((uint64_t{second} << 32 | first) >> (8 * at));
#endif
}

// A word of two halves. The upper halves of the arguments are ignored.
FUSEDOPT_HD uint32_t word_of(uint32_t low, uint32_t high) { return (low & 0xffffu) | high << 16; }

// A word of two upper halves.
FUSEDOPT_HD uint32_t word_of_uppers(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, 0x7632);
#else
  return low >> 16 | (high & 0xffff0000u);
#endif
}

// The places (core/codes.h) of two codes, the first or the second two of four bytes: two bfloat16
// numbers in a word, so one instruction does for both.
template <class Code>
FUSEDOPT_HD uint32_t places_of_two(uint32_t codes, int which) {
#if defined(__CUDA_ARCH__)
  const auto smaller_two = [](uint32_t a, uint32_t b) {
    uint32_t y;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
  };
  const uint32_t two = __byte_perm(codes, 0, which == 0 ? 0x4140u : 0x4342u);
  const auto on_line = [=](int j) {
    return (two << Code::line(j).shift) + Code::line(j).offset * 0x00010001u;
  };
  uint32_t found = on_line(0);
#pragma unroll
  for (int j = 1; j < Code::kLines; ++j) found = smaller_two(found, on_line(j));
  return found;
#else
  codes >>= 16 * which;
  return upper_halves_of_places<Code>(codes & 0xffu) |
         upper_halves_of_places<Code>(codes >> 8 & 0xffu) << 16;
#endif
}

// Byte j of a word as a signed number, times 256.
FUSEDOPT_HD uint32_t signed_byte_of(uint32_t word, int j) {
#if defined(__CUDA_ARCH__)
  // __byte_perm() has no copies of a byte's upper bit (8 and more).
  uint32_t found;
  asm("prmt.b32 %0, %1, 0, %2;"
      : "=r"(found)
      : "r"(word), "r"(0x8804u + 0x1110u * static_cast<uint32_t>(j)));
  return found;
#else
  return (((word >> 8 * j) & 0xffu) ^ 0x80u) * 256u - 0x8000u;
#endif
}

// A word of four bytes: byte number kByte of each argument.
template <int kByte>
FUSEDOPT_HD uint32_t word_of_bytes(uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t kTwo = 0x40 + 0x11 * kByte;
  return __byte_perm(__byte_perm(b0, b1, kTwo), __byte_perm(b2, b3, kTwo), 0x5410);
#else
  const auto byte = [](uint32_t word) { return word >> 8 * kByte & 0xffu; };
  return byte(b0) | byte(b1) << 8 | byte(b2) << 16 | byte(b3) << 24;
#endif
}

// A word of two numbers in a 16-bit format, rounded to nearest even in one instruction.
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

template <bool kFlushes, int kCount>
FUSEDOPT_HD float largest_magnitude(const Pack<float, kCount>& values) {
  float largest = fabsf(values[0]);
  for (int j = 1; j < kCount; ++j) largest = larger_or_nan<kFlushes>(largest, fabsf(values[j]));
  return largest;
}

// Loads an update in eight accesses of 16 bytes that do not depend on each other, so that their
// latencies overlap.
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
