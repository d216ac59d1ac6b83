// Turns the bytes of a stage (cuda/stage.h) into numbers, and writes results back to global memory:
// what core/element.h asks of memory, for dense updates.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/element.h"
#include "core/stochastic.h"
#include "cuda/access.h"
#include "cuda/stage.h"

namespace fusedopt::cuda {

// `Memory` of core/element.h for the elements that a thread computes at a time. Results go from
// registers to global memory and not through shared memory: nothing waits for a store.
template <class Rule, class T, class Kind>
class Staged {
  static constexpr int kCount = kThreadElements<T>;
  using Bits = Pack<uint32_t, kCount>;

 public:
  using Values = Pack<T, kCount>;
  static constexpr bool kRoundsForNothing = true;
  static constexpr bool kSplitIsOneFormat = false;
  static constexpr bool kHasCodes = Kind::kHasCodes;
  static constexpr bool kLooksAtNumbers = Kind::kIsUsual;

  FUSEDOPT_HD Staged(const Stages<Rule, T, Kind>& stages, const Tile& tile, SharedPlace stage)
      : stages_(stages), tile_(tile), stage_(stage) {
    read_common<false>();
  }

  // Reads the stage once more, so that what has been read before takes no registers until then.
  FUSEDOPT_HD void read_again() {
    is_again_ = true;
    read_common<true>();
  }

  // Read from the kernel's arguments anew whenever it is asked for.
  FUSEDOPT_HD Formats formats() const { return stages_.formats(); }
  FUSEDOPT_HD DType one_format() const {
    if constexpr (kHasCodes) return DType::kAbsent;
    return static_cast<DType>(stages_.asked_anew(stages_.plan().one_format));
  }

  template <class Storage, bool>
  FUSEDOPT_HD void load(int operand, Values& to) const {
    // A float32 master is at the param's place (plan_stages), whose bytes are in registers already.
    const Bytes bytes = bytes_of(operand == kMaster ? kParam : operand);
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      // The last comes first: a pair's first float may then take the register of the word that both
      // are made of.
      for (int j = kCount - 1; j >= 0; --j)
        to[j] = static_cast<T>(float_from_pair(bytes[j / 2], j % 2 != 0));
    } else if constexpr (std::is_same_v<Storage, Float16>) {
      for (int j = 0; j < kCount; ++j)
        to[j] = static_cast<T>(float_from_half(static_cast<uint16_t>(word_with(bytes, j))));
    } else {
      constexpr int kPart = sizeof(Storage) / 4;
      for (int j = 0; j < kCount; ++j) {
        Words<kPart> part;
        for (int i = 0; i < kPart; ++i) part.words[i] = bytes[j * kPart + i];
        to[j] = static_cast<T>(bit_cast<Storage>(part));
      }
    }
  }

  // 16 bits of each element; the upper half of each word may hold other bits.
  template <bool>
  FUSEDOPT_HD void load_words(int operand, Bits& to) const {
    const Bytes bytes = bytes_of(operand);
    for (int j = 0; j < kCount; ++j) to[j] = word_with(bytes, j);
  }

  template <class Storage, bool kIsOneFormat>
  FUSEDOPT_HD void store(int operand, const Values& from) const {
    constexpr int kWords = kCount * sizeof(Storage) / 4;
    Words<kWords> words;
    if constexpr (sizeof(Storage) == 2) {
      for (int i = 0; i < kWords; ++i)
        words.words[i] = pack<Storage>(to_float(from[2 * i]), to_float(from[2 * i + 1]));
    } else {
      constexpr int kPart = sizeof(Storage) / 4;
      for (int j = 0; j < kCount; ++j) {
        const auto part = bit_cast<Words<kPart>>(static_cast<Storage>(from[j]));
        for (int i = 0; i < kPart; ++i) words.words[j * kPart + i] = part.words[i];
      }
    }
    write<kIsOneFormat>(operand, words);
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_bfloat16(int operand, const Pack<float, kCount>& from) const {
    Words<kCount / 2> words;
    for (int i = 0; i < kCount / 2; ++i)
      words.words[i] = word_of_uppers(as_bits(from[2 * i]), as_bits(from[2 * i + 1]));
    write<kIsOneFormat>(operand, words);
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_words(int operand, const Bits& from) const {
    Words<kCount / 2> words;
    for (int i = 0; i < kCount / 2; ++i) words.words[i] = word_of(from[2 * i], from[2 * i + 1]);
    write<kIsOneFormat>(operand, words);
  }

  FUSEDOPT_HD void load_signed_bytes(int operand, Bits& to) const {
    const Bytes bytes = bytes_of(operand);
    for (int j = 0; j < kCount; ++j) to[j] = signed_byte_of(bytes[j / 4], j % 4);
  }

  // Not for double, whose pieces would be less than a word of bytes.
  template <int kByte>
  FUSEDOPT_HD void store_bytes(int operand, const Bits& from) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      Words<kCount / 4> words;
      for (int i = 0; i < kCount / 4; ++i)
        words.words[i] =
            word_of_bytes<kByte>(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
      write<false>(operand, words);
    }
  }

  // The first half of a thread's elements may be of another group than the second.
  template <class Code>
  FUSEDOPT_HD void load_codes(int operand, Pack<float, kCount>& to) const {
    const Bytes bytes = bytes_of(operand);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t scale = half != 0 && stages_.has_two() ? bytes[3] : bytes[2];
      const uint32_t magnitudes = bytes[half] & (0x01010101u * Code::kMagnitudes);
      Half<float> places;
      Half<uint32_t> signs;
      for (int j = 0; j < kCount / 2; ++j) {
        places[j] = float_from_pair(places_of_two<Code>(magnitudes, j / 2), j % 2 != 0);
        signs[j] = bytes[half] << (24 - 8 * j);
      }
      const auto values = values_at<Code>(places, signs, as_float(scale));
      for (int j = 0; j < kCount / 2; ++j) to[half * kCount / 2 + j] = values[j];
    }
  }

  template <class Code>
  FUSEDOPT_HD void store_codes(int operand, const Pack<float, kCount>& from,
                               const Bits& fractions) const {
    const Half<float> values[] = {half_of(from, 0), half_of(from, 1)};
    float largest[] = {largest_magnitude<true>(values[0]), largest_magnitude<true>(values[1])};
    if (!stages_.has_two()) largest[0] = larger_or_nan(largest[0], largest[1]);
    float scale = 0, units = 0;
    Words<kCount / 4> words;
    BranchFree<> math;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || stages_.has_two()) {
        scale = scale_of(largest_of_lanes(as_bits(largest[half]), stages_.lanes_of_group()));
        units = units_in<Code>(scale, math);
        if (stages_.is_first_of_group())
          store_item(stages_.scale_of(operand, tile_.at[half]), scale);
      }
      const auto codes = encoded<Code>(values[half], units, half_of(fractions, half));
      const uint32_t word = word_of_bytes<3>(codes[0], codes[1], codes[2], codes[3]);
      words.words[half] = scale > 0 ? word : 0;
    }
    write<false>(operand, words);
  }

  FUSEDOPT_HD bool are_ordinary(const Pack<float, kCount>& numbers) const {
    return largest_magnitude<true>(numbers) <= as_float(kLargestOrdinary);
  }

  // Chunks and pieces start at even elements, so a piece has both elements of each pair that shares
  // a draw (core/stochastic.h).
  FUSEDOPT_HD void find_draws(uint32_t rounding_key, Bits& draws) const {
    constexpr uint32_t kPairs = kCount / 2;
    const auto draw_pairs = [&](uint64_t first, uint32_t begin,
                                uint32_t count) __attribute__((always_inline)) {
      const uint32_t key = draw_key(rounding_key, first);
      for (uint32_t j = 0; j < count; ++j) {
        const uint32_t draw = pair_draw(key, static_cast<uint32_t>(first) + j);
        draws[2 * (begin + j)] = draw;
        draws[2 * (begin + j) + 1] = second_of_pair(draw);
      }
    };
    const uint64_t first = stages_.first_pair();
    if (stages_.has_two()) {
      draw_pairs(first + tile_.at[0] * (kPairs / 2), 0, kPairs / 2);
      draw_pairs(first + tile_.at[1] * (kPairs / 2), kPairs / 2, kPairs / 2);
    } else {
      draw_pairs(first + tile_.at[0] * kPairs, 0, kPairs);
    }
  }

 private:
  template <class V>
  using Half = Pack<V, kCount / 2>;

  template <class V>
  static FUSEDOPT_HD Half<V> half_of(const Pack<V, kCount>& pack, int half) {
    Half<V> found;
    for (int j = 0; j < kCount / 2; ++j) found[j] = pack[half * kCount / 2 + j];
    return found;
  }

  // A thread's bytes of an operand. Of one with 16 bytes or fewer, these are twice the same 16.
  using Bytes = Pack<uint32_t, 8>;

  template <bool kAgain>
  FUSEDOPT_HD Bytes read(int operand) const {
    Bytes bytes;
    for (int half = 0; half < 2; ++half) {
      const auto part = load_shared<kAgain>(stage_ + stages_.plan().places[half][operand]);
      for (int i = 0; i < 4; ++i) bytes[half * 4 + i] = part.words[i];
    }
    return bytes;
  }
  // Without asking whether an operand is there: this takes no branch, and the bytes of one that is
  // absent are not used.
  template <bool kAgain>
  FUSEDOPT_HD void read_common() {
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if (is_common(k)) bytes_[k] = read<kAgain>(k);
    });
  }
  FUSEDOPT_HD Bytes bytes_of(int operand) const {
    if (is_common(operand)) return bytes_[operand];
    return is_again_ ? read<true>(operand) : read<false>(operand);
  }

  // A word with element j of 16 bits in its lower half. The upper half is not cleared: no reader
  // looks at it.
  static FUSEDOPT_HD uint32_t word_with(const Bytes& bytes, int j) {
    return j % 2 == 0 ? bytes[j / 2] : bytes[j / 2] >> 16;
  }

  // Stores a thread's words, with the widest accesses that the operand's alignment allows. With
  // `kIsPlain`, all operands have one format and those stored are aligned, so the plan need not be
  // looked at.
  template <bool kIsPlain, int kWords>
  FUSEDOPT_HD void write(int operand, const Words<kWords>& words) const {
    constexpr uint32_t kHalf = kWords / 2, kHalfBytes = 4 * kHalf;
    char* const data = stages_.data(operand);
    if constexpr (kWords <= 4)
      if (kIsPlain || (stages_.asked_anew(stages_.plan().whole) & only(operand)) != 0)
        return fusedopt::cuda::store_words(data + tile_.at[0] * (4 * kWords), words);
    if (kIsPlain || (stages_.asked_anew(stages_.plan().shifted) & only(operand)) == 0) {
      fusedopt::cuda::store_words(data + tile_.at[0] * kHalfBytes, half_of(words, 0));
      fusedopt::cuda::store_words(data + tile_.at[1] * kHalfBytes, half_of(words, kHalf));
      return;
    }
    const uint32_t bytes = stages_.piece_bytes(operand), first = tile_.at[0] * bytes;
    write_items(data + first, half_of(words, 0));
    write_items(data + (stages_.has_two() ? tile_.at[1] * bytes : first + kHalfBytes),
                half_of(words, kHalf));
  }

  template <int kWords>
  static FUSEDOPT_HD Words<kWords / 2> half_of(const Words<kWords>& words, uint32_t from) {
    Words<kWords / 2> half;
    for (int i = 0; i < kWords / 2; ++i) half.words[i] = words.words[from + i];
    return half;
  }

  // Stores to a misaligned place, element by element. Elements of 1 and 2 bytes are stored as such,
  // as they may lie within a word; those of 4 and 8 bytes as words.
  template <int kWords>
  static FUSEDOPT_HD void write_items(char* to, const Words<kWords>& words) {
    constexpr int kInWord = kCount / 2 / kWords;  // elements
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kInWord == 4) {
        for (int j = 0; j < 4; ++j)
          store_item(reinterpret_cast<uint8_t*>(to) + 4 * i + j,
                     static_cast<uint8_t>(words.words[i] >> 8 * j));
      } else if constexpr (kInWord == 2) {
        store_item(reinterpret_cast<uint16_t*>(to) + 2 * i, static_cast<uint16_t>(words.words[i]));
        store_item(reinterpret_cast<uint16_t*>(to) + 2 * i + 1,
                   static_cast<uint16_t>(words.words[i] >> 16));
      } else {
        store_item(reinterpret_cast<uint32_t*>(to) + i, words.words[i]);
      }
    }
  }

  const Stages<Rule, T, Kind>& stages_;
  const Tile& tile_;
  const SharedPlace stage_;
  Bytes bytes_[kMaxOperands];
  bool is_again_ = false;  // what is not in registers is loaded anew, too
};

}  // namespace fusedopt::cuda
