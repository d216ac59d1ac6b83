// The loops of a step: a block of elements at a time, in registers. Part of isa_kernels.h, which
// says what must not be used here.
#pragma once

#include "core/element.h"
#include "core/step.h"
#include "cpu/cursor.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// Registers in a block, whose elements are computed at once.
constexpr int kCount = 2;
// How far ahead memory is asked for, in elements. The processor's own prefetching starts anew on
// every page, and a step walks through four or five pages at once.
constexpr int64_t kPrefetchAhead = 256;
constexpr int64_t kCacheLine = 64;
// Elements of strided updates are gathered in tiles of so many.
constexpr int64_t kTileElements = 256;

template <class T>
using Register = Vec<T, kRegisterBytes / static_cast<int>(sizeof(T))>;
template <class T>
constexpr int64_t kBlock = kCount * kRegisterBytes / static_cast<int64_t>(sizeof(T));

// `Memory` of core/element.h for a block of elements, which are consecutive in each operand. They
// fill one register after the other. But where all operands are 16 bits wide, the first register
// has the elements at even places and the second those at odd places: then a load is a shift and a
// mask of the words, which takes the fewest instructions.
template <class T>
struct Block {
  using Values = Pack<Register<T>, kCount>;
  using Bits = typename Lanes<Values>::Bits;
  using Word = typename Bits::Value;
  static constexpr bool kRoundsForNothing = false;
  static constexpr bool kSplitIsOneFormat = true;
  static constexpr uint32_t kUpperHalf = 0xffff0000u;
  static constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));

  Formats stored_as;
  DType format;           // as Formats::one_format()
  void* const* data;      // of each operand
  int64_t at;             // elements from there to the block
  uint64_t number;        // number in its tensor of the element at `data`
  const uint32_t* draws;  // if not nullptr, the draws of the elements, and `number` is not used
  int64_t ahead = 0;      // how far ahead to ask for memory, in elements

  FUSEDOPT_HD const Formats& formats() const { return stored_as; }
  FUSEDOPT_HD DType one_format() const { return format; }

  template <class Storage, bool kIsOneFormat>
  FUSEDOPT_HD void load(int operand, Values& to) const {
    const char* const from = place<Storage>(operand);
    constexpr int64_t kSize = sizeof(Storage);
    for (int64_t byte = 0; byte < kBlock<T> * kSize; byte += kCacheLine)
      __builtin_prefetch(from + ahead * kSize + byte);
    if constexpr (kIsOneFormat && std::is_same_v<Storage, BFloat16>) {
      const Word pairs = read<typename Word::Raw>(from);
      to[0] = as_float(pairs << 16);
      to[1] = as_float(pairs & kUpperHalf);
    } else {
      Stored<Register<T>, Storage>::load(from, to.values);
    }
  }

  template <class Storage, bool kIsOneFormat>
  FUSEDOPT_HD void store(int operand, const Values& from) const {
    if constexpr (!kIsOneFormat || !std::is_same_v<Storage, BFloat16>)
      Stored<Register<T>, Storage>::store(place<Storage>(operand), from.values);
    else if (stored_as.has(kMaster))  // a NaN may then have any bits (bfloat16_nearest)
      store_upper_halves<kIsOneFormat>(operand, rounded_to_bfloat16(to_float(from)));
    else
      write(place<Storage>(operand), bfloat16_nearest(as_bits(from[0]), as_bits(from[1])).raw);
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_bfloat16(int operand, const typename Lanes<Values>::Float& from) const {
    store_upper_halves<kIsOneFormat>(operand, as_bits(from));
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void load_words(int operand, Bits& to) const {
    const char* const from = place<uint16_t>(operand);
    if constexpr (kIsOneFormat) {
      const Word pairs = read<typename Word::Raw>(from);
      to[0] = pairs & ~kUpperHalf;
      to[1] = pairs >> 16;
    } else {
      Halves::load(from, to.values);
    }
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_words(int operand, const Bits& from) const {
    char* const to = place<uint16_t>(operand);
    if constexpr (kIsOneFormat)
      write(to, ((from[0] & ~kUpperHalf) | (from[1] << 16)).raw);
    else
      Halves::store(to, from.values);
  }

  FUSEDOPT_HD void find_draws(uint32_t rounding_key, Bits& to) const {
    using Raw = typename Word::Raw;
    if (draws != nullptr) {
      unroll<kCount>([&](auto j) __attribute__((always_inline)) {
        to[j] = read<Raw>(draws + at + j * kLanes);
      });
      return;
    }
    // Blocks begin at multiples of their size, so all elements have the same upper half of the
    // number, and one key.
    const uint64_t first = (number + static_cast<uint64_t>(at)) / 2;
    const uint32_t key = draw_key(rounding_key, first);
    Raw lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
    const Word pairs = pair_draw(key, static_cast<uint32_t>(first) + Word(lane));
    to[0] = pairs;
    to[1] = second_of_pair(pairs);
    if (!is(format, DType::kBFloat16)) interleave(to.values);
  }

 private:
  template <class Storage>
  FUSEDOPT_HD char* place(int operand) const {
    return static_cast<char*>(data[operand]) + at * static_cast<int64_t>(sizeof(Storage));
  }

  template <bool kIsOneFormat>
  FUSEDOPT_HD void store_upper_halves(int operand, const Bits& from) const {
    char* const to = place<uint16_t>(operand);
    if constexpr (kIsOneFormat)
      write(to, ((from[0] >> 16) | (from[1] & kUpperHalf)).raw);
    else
      cpu::store_upper_halves(to, from[0], from[1]);
  }
};

// n elements from the block on, rounded up to whole blocks. Not inlined, so that there is one copy
// for its three callers.
template <class Rule, class T>
__attribute__((noinline)) void update_blocks(typename Rule::Variant variant,
                                             const StepScalars<Rule, T>& scalars, Block<T> block,
                                             int64_t n) {
  for (; block.at < n; block.at += kBlock<T>) {
    // No prefetch beyond the end: those cache lines may be another thread's.
    block.ahead = block.at + kPrefetchAhead + kBlock<T> <= n ? kPrefetchAhead : 0;
    Elements<Rule, T, typename Block<T>::Values, Block<T>> elements(block);
    Ieee math;
    elements.load();
    elements.apply(variant, scalars.rule, math);
    elements.finish(scalars.common);
  }
}

// Strided elements of each operand, gathered so that they are consecutive, and scattered again.
template <class T>
class Tile {
 public:
  Tile(const ParamUpdate& update, uint32_t rounding_key)
      : update_(update), rounding_key_(rounding_key) {
    for (int k = 0; k < kMaxOperands; ++k) data_[k] = bytes_[k];
  }

  void load(Cursor& cursor, int64_t n) {
    for_each_run(cursor, n, [&](int64_t offset, int64_t run, const Cursor& from) {
      for_each_operand([&](int k, auto item) {
        using Item = decltype(item);
        const Item* const source = static_cast<const Item*>(update_.data[k]) + from.at(k);
        copy(reinterpret_cast<Item*>(bytes_[k]) + offset, 1, source, from.stride(k), run);
      });
      if (update_.formats.stochastic != 0) draw(offset, run, from);
    });
    // Zeros fill the last block up. Their results are not stored.
    for_each_operand([&](int k, auto item) {
      const int64_t size = sizeof(item), end = (n + kBlock<T> - 1) / kBlock<T> * kBlock<T>;
      __builtin_memset(bytes_[k] + n * size, 0, static_cast<size_t>((end - n) * size));
    });
  }

  void store(Cursor& cursor, int64_t n) const {
    for_each_run(cursor, n, [&](int64_t offset, int64_t run, const Cursor& to) {
      for_each_operand([&](int k, auto item) {
        using Item = decltype(item);
        if (k == kGrad) return;
        Item* const target = static_cast<Item*>(update_.data[k]) + to.at(k);
        copy(target, to.stride(k), reinterpret_cast<const Item*>(bytes_[k]) + offset, 1, run);
      });
    });
  }

  Block<T> block() const {
    // kAbsent: the elements are in order in the registers, as the draws are.
    return {update_.formats, DType::kAbsent, data_, 0, 0, draws_};
  }

 private:
  template <class F>
  FUSEDOPT_HD void for_each_operand(const F& f) const {
    for (int k = 0; k < kMaxOperands; ++k) {
      const int64_t size = item_size(update_.formats.dtypes[k]);
      if (size == 2) f(k, uint16_t{});
      if (size == 4) f(k, uint32_t{});
      if (size == 8) f(k, uint64_t{});
    }
  }

  template <class Item>
  static void copy(Item* to, int64_t to_stride, const Item* from, int64_t from_stride, int64_t n) {
    if (to_stride == 1 && from_stride == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    else
      for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
  }

  void draw(int64_t offset, int64_t n, const Cursor& from) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t number = from.at(kIndex) + i * from.stride(kIndex);
      draws_[offset + i] = own_draw(rounding_key_, static_cast<uint64_t>(number));
    }
  }

  const ParamUpdate& update_;
  const uint32_t rounding_key_;
  void* data_[kMaxOperands];
  alignas(kCacheLine) char bytes_[kMaxOperands][kTileElements * sizeof(T)];
  alignas(kCacheLine) uint32_t draws_[kTileElements];
};

// The last elements of a dense update, fewer than a block: they are copied into a block and back.
// What else is in the block is computed with, and the result is not stored.
template <class Rule, class T>
void update_rest(typename Rule::Variant variant, const StepScalars<Rule, T>& scalars,
                 Block<T> block, int64_t n) {
  alignas(kCacheLine) char bytes[kMaxOperands][kBlock<T> * sizeof(T)];
  void* copies[kMaxOperands];
  void* const* const data = block.data;
  const auto size_of = [&](int k) {
    return static_cast<size_t>(n * item_size(block.stored_as.dtypes[k]));
  };
  for (int k = 0; k < kMaxOperands; ++k) {
    copies[k] = bytes[k];
    if (block.stored_as.has(k)) __builtin_memcpy(bytes[k], data[k], size_of(k));
  }
  block.data = copies;
  update_blocks<Rule, T>(variant, scalars, block, n);
  for (int k = 0; k < kMaxOperands; ++k)
    if (k != kGrad && block.stored_as.has(k)) __builtin_memcpy(data[k], bytes[k], size_of(k));
}

// Elements [begin, end) of an update.
template <class Rule, class T>
void update_elements(const Step& step, const ParamUpdate& update, int64_t begin, int64_t end) {
  const auto variant = Rule::Variant::of(update.variant);
  const StepScalars<Rule, T> scalars =
      step.scalars[update.scalars].template of<Rule>().template as<T>();
  if (update.layout == kDense) {
    const Formats formats = update.formats;
    void* data[kMaxOperands];
    Block<T> block = {formats, formats.one_format(Block<T>::kSplitIsOneFormat), data, 0, 0,
                      nullptr};
    const auto go_to = [&](int64_t element) {
      block.number = static_cast<uint64_t>(element);
      for (int k = 0; k < kMaxOperands; ++k)
        data[k] = static_cast<char*>(update.data[k]) + element * item_size(formats.dtypes[k]);
    };
    const int64_t whole = (end - begin) / kBlock<T> * kBlock<T>;
    go_to(begin);
    if (whole > 0) update_blocks<Rule, T>(variant, scalars, block, whole);
    begin += whole;
    go_to(begin);
    if (begin < end) update_rest<Rule, T>(variant, scalars, block, end - begin);
    return;
  }
  const Layout& layout = step.layouts[update.layout];
  Cursor source(layout, begin), target(layout, begin);
  Tile<T> tile(update, scalars.common.rounding_key);
  for (; begin < end; begin += kTileElements) {
    const int64_t n = end - begin < kTileElements ? end - begin : kTileElements;
    tile.load(source, n);
    update_blocks<Rule, T>(variant, scalars, tile.block(), n);
    tile.store(target, n);
  }
}

}  // namespace
}  // namespace fusedopt::cpu
