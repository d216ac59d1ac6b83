// A block of elements in registers. Part of isa_kernels.h, which says what must not be used here.
#pragma once

#include <type_traits>

#include "core/element.h"
#include "cpu/codes.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// Registers in a block, whose elements are computed at once: enough that the processor has other
// work while it waits for roots and divisions, and no more than it has registers for.
constexpr int kCount = kRegisterBytes == 64 ? 4 : 2;
// How far ahead memory is asked for, in elements. The processor's own prefetching starts anew on
// every page, and a step walks through four or five pages at once.
constexpr int64_t kPrefetchAhead = 256;

template <class T>
using Register = Vec<T, kRegisterBytes / static_cast<int>(sizeof(T))>;
template <class T>
constexpr int64_t kBlock = kCount * kRegisterBytes / static_cast<int64_t>(sizeof(T));

// Loads two registers of consecutive numbers: of bfloat16 ones those at even and those at odd
// places, which takes a shift and a mask of the words.
template <class Storage, class V>
FUSEDOPT_HD void load_in_any_order(const char* from, V (&to)[2]) {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    using Words = typename Lanes<V>::Bits;
    const Words pairs = read<typename Words::Raw>(from);
    to[0] = as_float(pairs << 16);
    to[1] = as_float(pairs & 0xffff0000u);
  } else {
    Stored<V, Storage>::load(from, to);
  }
}

// Calls f(p, registers) for each two registers, number 2 p and the next one.
template <class V, class F>
FUSEDOPT_HD void for_each_pair(V (&registers)[kCount], const F& f) {
  unroll<kCount / 2>([&](auto p) __attribute__((always_inline)) {
    f(p, *reinterpret_cast<V(*)[2]>(registers + 2 * p));
  });
}

// Elements [begin, end) of operands that are consecutive.
struct Piece {
  void* const* data;
  float* const* scales;  // as ParamUpdate's
  int64_t begin, end;
  int64_t first_element;  // as ParamUpdate's
};

// What the blocks of alike updates have in common.
struct BlockSetup {
  Formats stored_as;
  DType format;           // as Formats::one_format()
  const uint32_t* draws;  // of the elements; nullptr if they follow from `at` and `first_element`
  NewValues* kept;        // of each state; what becomes codes is there until encode() is called
};

// `Memory` of core/element.h for a block of elements, which are consecutive in each operand. They
// fill one register after the other. But where all operands are 16 bits wide, the first of each two
// registers has the elements at even places and the second those at odd places: then a load is a
// shift and a mask of the words, which takes the fewest instructions.
template <class T, bool kCodes>
struct Block : BlockSetup {
  using Values = Pack<Register<T>, kCount>;
  using Bits = typename Lanes<Values>::Bits;
  using Word = typename Bits::Value;
  static constexpr bool kRoundsForNothing = false;
  static constexpr bool kSplitIsOneFormat = true;
  static constexpr bool kHasCodes = kCodes;
  static constexpr bool kLooksAtNumbers = true;
  static constexpr uint32_t kUpperHalf = 0xffff0000u;
  static constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));
  static constexpr int64_t kPair = 2 * kLanes;  // elements in two registers

  void* const* data;      // of each operand
  float* const* scales;   // of each state that is codes
  int64_t first_element;  // as ParamUpdate's
  int64_t at;             // elements from there to the block
  int64_t ahead;          // how far ahead to ask for memory, in elements

  // Blocks of consecutive elements.
  Block(const BlockSetup& setup, const Piece& piece)
      : BlockSetup(setup),
        data(piece.data),
        scales(piece.scales),
        first_element(piece.first_element),
        at(piece.begin) {}

  FUSEDOPT_HD const Formats& formats() const { return stored_as; }
  FUSEDOPT_HD DType one_format() const { return kHasCodes ? DType::kAbsent : format; }

  template <class Storage, bool kIsOneFormat>
  FUSEDOPT_HD void load(int operand, Values& to) const {
    const char* const from = place<Storage>(operand);
    constexpr int64_t kSize = sizeof(Storage);
    for (int64_t byte = 0; byte < kBlock<T> * kSize; byte += kCacheLine)
      __builtin_prefetch(from + ahead * kSize + byte);
    for_each_pair(to.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      if constexpr (kIsOneFormat)
        load_in_any_order<Storage>(from + p * kPair * kSize, two);
      else
        Stored<Register<T>, Storage>::load(from + p * kPair * kSize, two);
    });
  }

  template <class Storage, bool kIsOneFormat>
  FUSEDOPT_HD void store(int operand, const Values& from) const {
    constexpr bool kIsBFloat16 = kIsOneFormat && std::is_same_v<Storage, BFloat16>;
    if (kIsBFloat16 && stored_as.has(kMaster))  // a NaN may then have any bits (bfloat16_nearest)
      return store_upper_halves<kIsOneFormat>(operand, rounded_to_bfloat16(to_float(from)));
    char* const to = place<Storage>(operand);
    for_each_pair(from.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      char* const place = to + p * kPair * static_cast<int64_t>(sizeof(Storage));
      if constexpr (kIsBFloat16)
        write(place, bfloat16_nearest(as_bits(two[0]), as_bits(two[1])).raw);
      else
        Stored<Register<T>, Storage>::store(place, two);
    });
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_bfloat16(int operand, const typename Lanes<Values>::Float& from) const {
    store_upper_halves<kIsOneFormat>(operand, as_bits(from));
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void load_words(int operand, Bits& to) const {
    const char* const from = place<uint16_t>(operand);
    for_each_pair(to.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      if constexpr (kIsOneFormat) {
        const Word both = read<typename Word::Raw>(from + p * 2 * kPair);
        two[0] = both & ~kUpperHalf;
        two[1] = both >> 16;
      } else {
        Halves::load(from + p * 2 * kPair, two);
      }
    });
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_words(int operand, const Bits& from) const {
    char* const to = place<uint16_t>(operand);
    for_each_pair(from.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      if constexpr (kIsOneFormat)
        write(to + p * 2 * kPair, ((two[0] & ~kUpperHalf) | (two[1] << 16)).raw);
      else
        Halves::store(to + p * 2 * kPair, two);
    });
  }

  FUSEDOPT_HD void load_signed_bytes(int operand, Bits& to) const {
    const char* const from = place<uint8_t>(operand);
    __builtin_prefetch(from + ahead);
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      to[j] = read_signed_bytes<kLanes>(from + j * kLanes) << 8;
    });
  }

  template <int kByte>
  FUSEDOPT_HD void store_bytes(int operand, const Bits& from) const {
    char* const to = place<uint8_t>(operand);
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      write_bytes(to + j * kLanes, from[j] >> 8 * kByte);
    });
  }

  template <class Float>
  FUSEDOPT_HD bool are_ordinary(const Float& numbers) const {
    const Bits magnitudes = as_bits(numbers) & 0x7fffffffu;
    Word largest = magnitudes[0];
    for (int j = 1; j < kCount; ++j) largest = larger(largest, magnitudes[j]);
    return !any(largest > Word(kLargestOrdinary));
  }

  // A block is part of one group.
  template <class Code, class Float>
  FUSEDOPT_HD void load_codes(int operand, Float& to) const {
    const char* const from = place<uint8_t>(operand);
    __builtin_prefetch(from + ahead);
    for_each_pair(to.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      read_codes<Code>(from + p * kPair, scales[operand - kFirstState][at / kGroup], two);
    });
  }

  template <class Code, class Float>
  FUSEDOPT_HD void store_codes(int operand, const Float& from, const Bits& fractions) const {
    NewValues& to = kept[operand - kFirstState];
    const int64_t place = at % kEncodedAtOnce;
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      write(to.values + place + j * kLanes, from[j].raw);
      write(to.fractions + place + j * kLanes, fractions[j].raw);
    });
  }

  // Where the kept elements from `begin` on end, `end` at the latest.
  static int64_t end_of_kept(int64_t begin, int64_t end) {
    const int64_t full = (begin / kEncodedAtOnce + 1) * kEncodedAtOnce;
    return full < end ? full : end;
  }

  // Makes the codes of kept elements [from, to).
  void encode(int64_t from, int64_t to) const {
    for (int s = 0; s < kMaxStates; ++s) {
      const DType dtype = stored_as.dtypes[kFirstState + s];
      char* const codes = static_cast<char*>(data[kFirstState + s]);
      if (is(dtype, DType::kSignedCodes))
        cpu::encode<SignedCode>(kept[s], from, to, scales[s], codes);
      if (is(dtype, DType::kPositiveCodes))
        cpu::encode<PositiveCode>(kept[s], from, to, scales[s], codes);
    }
  }

  FUSEDOPT_HD void find_draws(uint32_t rounding_key, Bits& to) const {
    using Raw = typename Word::Raw;
    if (draws != nullptr) {
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        to[j] = read<Raw>(draws + at + j * kLanes);
      });
      return;
    }
    static_assert(kBlock<T> <= kMaxDrawBlock, "all pairs of a block have one key");
    const uint64_t first = static_cast<uint64_t>(first_element + at) / 2;
    const uint32_t key = draw_key(rounding_key, first);
    Raw lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
    for_each_pair(to.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      const uint32_t number = static_cast<uint32_t>(first) + p * kLanes;
      two[0] = pair_draw(key, number + Word(lane));
      two[1] = second_of_pair(two[0]);
      if (!is(format, DType::kBFloat16)) interleave(two);
    });
  }

 private:
  template <class Storage>
  FUSEDOPT_HD char* place(int operand) const {
    return static_cast<char*>(data[operand]) + at * static_cast<int64_t>(sizeof(Storage));
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_upper_halves(int operand, const Bits& from) const {
    char* const to = place<uint16_t>(operand);
    for_each_pair(from.values, [&](auto p, auto& two) __attribute__((always_inline)) {
      if constexpr (kIsOneFormat)
        write(to + p * 2 * kPair, ((two[0] >> 16) | (two[1] & kUpperHalf)).raw);
      else
        cpu::store_upper_halves(to + p * 2 * kPair, two[0], two[1]);
    });
  }
};

}  // namespace
}  // namespace fusedopt::cpu
