// The loops of a step: a block of elements at a time, in registers. Part of isa_kernels.h, which
// says what must not be used here.
#pragma once

#include "core/element.h"
#include "core/step.h"
#include "cpu/codes.h"
#include "cpu/cursor.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// Registers in a block, whose elements are computed at once: enough that the processor has other
// work while it waits for roots and divisions, and no more than it has registers for.
constexpr int kCount = kRegisterBytes == 64 ? 4 : 2;
// How far ahead memory is asked for, in elements. The processor's own prefetching starts anew on
// every page, and a step walks through four or five pages at once.
constexpr int64_t kPrefetchAhead = 256;
// Elements that do not lie as a block does are gathered in tiles of so many.
constexpr int64_t kTileElements = 256;
// Pieces that are updated at once, enough that the preparations for them do not count.
constexpr int kMaxPieces = 64;

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

// `Memory` of core/element.h for a block of elements, which are consecutive in each operand. They
// fill one register after the other. But where all operands are 16 bits wide, the first of each two
// registers has the elements at even places and the second those at odd places: then a load is a
// shift and a mask of the words, which takes the fewest instructions.
template <class T>
struct Block {
  using Values = Pack<Register<T>, kCount>;
  using Bits = typename Lanes<Values>::Bits;
  using Word = typename Bits::Value;
  static constexpr bool kRoundsForNothing = false;
  static constexpr bool kSplitIsOneFormat = true;
  static constexpr bool kHasCodes = true;
  static constexpr bool kLooksAtNumbers = true;
  static constexpr uint32_t kUpperHalf = 0xffff0000u;
  static constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));
  static constexpr int64_t kPair = 2 * kLanes;  // elements in two registers

  Formats stored_as;
  DType format;           // as Formats::one_format()
  const uint32_t* draws;  // of the elements; nullptr if they follow from `at` and `first_element`
  CodeGroup* groups = nullptr;     // where new states go until a group of codes is complete
  void* const* data = nullptr;     // of each operand
  float* const* scales = nullptr;  // of each state that is codes
  int64_t at = 0;                  // elements from there to the block
  int64_t end = 0;                 // elements from there to the end, which may be in a group
  int64_t first_element = 0;       // as ParamUpdate's
  int64_t ahead = 0;               // how far ahead to ask for memory, in elements

  FUSEDOPT_HD const Formats& formats() const { return stored_as; }
  FUSEDOPT_HD DType one_format() const { return format; }

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
    const int64_t in_group = at % kGroup, begin = at - in_group;
    CodeGroup& to = groups[operand - kFirstState];
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      write(to.values + in_group + j * kLanes, from[j].raw);
      write(to.fractions + in_group + j * kLanes, fractions[j].raw);
    });
    if (in_group + kBlock<T> < kGroup) return;
    float* const scale = scales[operand - kFirstState] + begin / kGroup;
    encode_group<Code>(to, scale, static_cast<uint8_t*>(data[operand]) + begin,
                       end - begin < kGroup ? end - begin : kGroup);
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

// Elements [begin, end) of operands that are consecutive.
struct Piece {
  void* const* data;
  float* const* scales;  // as ParamUpdate's
  int64_t begin, end;
  int64_t first_element = 0;  // as ParamUpdate's
};

struct Pieces {
  Piece list[kMaxPieces];
  int count = 0;
  int64_t elements = 0;
  void* rows[kMaxPieces][kMaxOperands];  // where those that are rows lie

  void add(const Piece& piece) {
    list[count++] = piece;
    elements += piece.end - piece.begin;
  }

  // Elements [begin, end) of a row of the layout's list.
  void add_row(const ParamUpdate& update, const Layout& layout, int64_t row, int64_t begin,
               int64_t end) {
    const Dim& dim = layout.dims[0];
    const int64_t place = layout.rows[row];
    void** const data = rows[count];
    for (int k = 0; k < kMaxOperands; ++k) {
      const int64_t at = (k == kGrad ? row : place) * dim.strides[k];
      data[k] = static_cast<char*>(update.data[k]) + at * item_size(update.formats.dtypes[k]);
    }
    add({data, nullptr, begin, end, update.first_element + place * dim.strides[kIndex]});
  }
};

// Whether each row of the layout's list is so many blocks of consecutive elements, for which draws
// are made at once.
template <class T>
bool has_rows_of_blocks(const Layout& layout, const Formats& formats) {
  if (layout.rows == nullptr || layout.num_dims != 2) return false;
  const Dim& dim = layout.dims[1];
  for (int k = 0; k < kMaxOperands; ++k)
    if (formats.dtypes[k] != DType::kAbsent && dim.strides[k] != 1) return false;
  const bool has_draws = formats.stochastic != 0;
  if (has_draws && (dim.strides[kIndex] != 1 || dim.size % kMaxDrawBlock != 0)) return false;
  return dim.size % kBlock<T> == 0;
}

// Pieces of whole blocks, and of whole groups where there are codes; an end is rounded up to one.
// Not inlined, so that there is one copy for its two callers.
template <class Rule, class T>
__attribute__((noinline)) void update_blocks(typename Rule::Variant variant,
                                             const StepScalars<Rule, T>& scalars, Block<T> block,
                                             const Piece* pieces, int count) {
  for (int i = 0; i < count; ++i) {
    const Piece piece = pieces[i];  // a copy, which the stores below cannot change
    block.data = piece.data;
    block.scales = piece.scales;
    block.first_element = piece.first_element;
    block.end = piece.end;
    const int64_t whole = block.groups != nullptr ? (piece.end + kGroup - 1) & -kGroup : piece.end;
    for (block.at = piece.begin; block.at < whole; block.at += kBlock<T>) {
      // No prefetch beyond the end: those cache lines may be another thread's.
      block.ahead = block.at + kPrefetchAhead + kBlock<T> <= piece.end ? kPrefetchAhead : 0;
      Elements<Rule, T, typename Block<T>::Values, Block<T>> elements(block);
      Ieee math;
      elements.load();
      elements.apply(variant, scalars.rule, math);
      elements.finish(scalars.common);
    }
  }
}

// Elements that do not lie as a block does, gathered so that they are consecutive in each operand,
// and scattered again: those of a strided update, or the last ones of several dense updates.
template <class T>
class Tile {
 public:
  Tile(const Formats& formats, DType one_format, uint32_t rounding_key)
      : formats_(formats), one_format_(one_format), rounding_key_(rounding_key) {
    for (int k = 0; k < kMaxOperands; ++k) data_[k] = bytes_[k];
    for (int s = 0; s < kMaxStates; ++s) scales_[s] = group_scales_[s];
  }

  void load(const ParamUpdate& update, Cursor& cursor, int64_t n) {
    for_each_run(cursor, n, [&](int64_t offset, int64_t run, const Cursor& from) {
      for_each_operand([&](int k, auto item) {
        using Item = decltype(item);
        const Item* const source = static_cast<const Item*>(update.data[k]) + from.at(k);
        copy(reinterpret_cast<Item*>(bytes_[k]) + offset, 1, source, from.stride(k), run);
      });
      draw(offset, run, update.first_element + from.at(kIndex), from.stride(kIndex));
    });
    fill_up(n);
  }

  // The scales of groups from `begin` on, of `n` elements.
  void load_scales(float* const* scales, int64_t begin, int64_t n) {
    for_each_scale(begin, n, [&](int s, int64_t here, int64_t there) {
      group_scales_[s][here] = scales[s][there];
    });
  }
  void store_scales(float* const* scales, int64_t begin, int64_t n) const {
    for_each_scale(begin, n, [&](int s, int64_t here, int64_t there) {
      scales[s][there] = group_scales_[s][here];
    });
  }

  void store(const ParamUpdate& update, Cursor& cursor, int64_t n) const {
    for_each_run(cursor, n, [&](int64_t offset, int64_t run, const Cursor& to) {
      for_each_operand([&](int k, auto item) {
        using Item = decltype(item);
        if (k == kGrad) return;
        Item* const target = static_cast<Item*>(update.data[k]) + to.at(k);
        copy(target, to.stride(k), reinterpret_cast<const Item*>(bytes_[k]) + offset, 1, run);
      });
    });
  }

  void load(const Pieces& pieces) {
    for_each_operand([&](int k, auto item) {
      for_each_place<decltype(item)>(pieces, k, [](char* here, char* there, size_t bytes) {
        __builtin_memcpy(here, there, bytes);
      });
    });
    int64_t offset = 0;
    for (int i = 0; formats_.stochastic != 0 && i < pieces.count; ++i) {
      const Piece& piece = pieces.list[i];
      draw(offset, piece.end - piece.begin, piece.first_element + piece.begin, 1);
      offset += piece.end - piece.begin;
    }
    fill_up(pieces.elements);
  }

  void store(const Pieces& pieces) {
    for_each_operand([&](int k, auto item) {
      if (k == kGrad) return;
      for_each_place<decltype(item)>(pieces, k, [](char* here, char* there, size_t bytes) {
        __builtin_memcpy(there, here, bytes);
      });
    });
  }

  Block<T> block(CodeGroup* groups) const {
    // kAbsent: the elements are in order in the registers, as the draws are.
    return {formats_, formats_.stochastic == 0 ? one_format_ : DType::kAbsent, draws_, groups};
  }
  Piece piece(int64_t n) const { return {data_, scales_, 0, n}; }

 private:
  template <class F>
  FUSEDOPT_HD void for_each_operand(const F& f) const {
    for (int k = 0; k < kMaxOperands; ++k) {
      const int64_t size = item_size(formats_.dtypes[k]);
      if (size == 1) f(k, uint8_t{});
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

  // Calls f(here, there, bytes) for what a tile of the pieces has of an operand.
  template <class Item, class F>
  FUSEDOPT_HD void for_each_place(const Pieces& pieces, int operand, const F& f) {
    char* here = bytes_[operand];
    for (int i = 0; i < pieces.count; ++i) {
      const Piece& piece = pieces.list[i];
      const auto bytes = static_cast<size_t>(piece.end - piece.begin) * sizeof(Item);
      f(here, reinterpret_cast<char*>(static_cast<Item*>(piece.data[operand]) + piece.begin),
        bytes);
      here += bytes;
    }
  }

  template <class F>
  void for_each_scale(int64_t begin, int64_t n, const F& f) const {
    for (int s = 0; s < kMaxStates; ++s)
      if (is_code(formats_.dtypes[kFirstState + s]))
        for (int64_t g = 0; g < num_groups(n); ++g) f(s, g, begin / kGroup + g);
  }

  // Zeros fill the last block or group up. Their results are not stored.
  void fill_up(int64_t n) {
    const int64_t whole = formats_.has_codes() ? kGroup : kBlock<T>;
    for_each_operand([&](int k, auto item) {
      const int64_t size = sizeof(item), end = (n + whole - 1) / whole * whole;
      __builtin_memset(bytes_[k] + n * size, 0, static_cast<size_t>((end - n) * size));
    });
  }

  void draw(int64_t offset, int64_t n, int64_t number, int64_t stride) {
    if (formats_.stochastic == 0) return;
    for (int64_t i = 0; i < n; ++i)
      draws_[offset + i] = own_draw(rounding_key_, static_cast<uint64_t>(number + i * stride));
  }

  const Formats formats_;
  const DType one_format_;
  const uint32_t rounding_key_;
  void* data_[kMaxOperands];
  float* scales_[kMaxStates];
  float group_scales_[kMaxStates][kTileElements / kGroup];
  alignas(kCacheLine) char bytes_[kMaxOperands][kTileElements * sizeof(T)];
  alignas(kCacheLine) uint32_t draws_[kTileElements];
};

// The parts of updates that make up a chunk, one after the other.
class Parts {
 public:
  Parts(const Step& step, int64_t chunk) {
    const ChunkStart from = step.chunks[chunk], to = step.chunks[chunk + 1];
    update_ = step.updates + from.update;
    begin_ = from.element;
    cut_ = step.updates + to.update;
    cut_at_ = to.element;
    stop_ = cut_at_ > 0 ? cut_ + 1 : cut_;
    skip();
  }

  bool done() const { return update_ == stop_; }
  const ParamUpdate& update() const { return *update_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return update_ == cut_ ? cut_at_ : update_->numel; }
  void next() {
    pass();
    skip();
  }

 private:
  void pass() {
    ++update_;
    begin_ = 0;
  }
  // Passes over what there is not to do.
  void skip() {
    while (!done() && (update_->device != kCpu || begin() >= end())) pass();
  }

  const ParamUpdate* update_;
  int64_t begin_;
  const ParamUpdate* cut_;  // of which the chunk has what is before `cut_at_`
  int64_t cut_at_;
  const ParamUpdate* stop_;
};

// Whether what has been prepared for one update does for the other.
bool are_alike(const ParamUpdate& a, const ParamUpdate& b) {
  return a.scalars == b.scalars && a.rule == b.rule && a.variant == b.variant &&
         __builtin_memcmp(&a.formats, &b.formats, sizeof(Formats)) == 0;
}

// The part that is at hand and those after it that are like it. Returns what is left. Not inlined,
// so that nothing is computed before the caller has set the mode.
template <class Rule, class T>
__attribute__((noinline)) Parts update_alike(const Step& step, Parts parts) {
  const ParamUpdate& first = parts.update();
  const auto variant = Rule::Variant::of(first.variant);
  const StepScalars<Rule, T> scalars =
      step.scalars[first.scalars].template of<Rule>().template as<T>();
  const DType one_format = first.formats.one_format(Block<T>::kSplitIsOneFormat);
  CodeGroup group_of_state[kMaxStates];
  CodeGroup* const groups = first.formats.has_codes() ? group_of_state : nullptr;
  const Block<T> block = {first.formats, one_format, nullptr, groups};
  Tile<T> tile(first.formats, one_format, scalars.common.rounding_key);
  const auto update_tile = [&](int64_t n) {
    const Piece piece = tile.piece(n);
    update_blocks<Rule, T>(variant, scalars, tile.block(groups), &piece, 1);
  };
  Pieces whole, rests;  // of blocks, and what is left
  const auto update_pieces = [&] {
    if (whole.count > 0) update_blocks<Rule, T>(variant, scalars, block, whole.list, whole.count);
    if (rests.count > 0) {
      const Piece& rest = rests.list[0];  // the only one where there are codes
      tile.load(rests);
      tile.load_scales(rest.scales, rest.begin, rests.elements);
      update_tile(rests.elements);
      tile.store(rests);
      tile.store_scales(rest.scales, rest.begin, rests.elements);
    }
    whole.count = rests.count = 0;
    rests.elements = 0;
  };
  for (; !parts.done() && are_alike(first, parts.update()); parts.next()) {
    const ParamUpdate& update = parts.update();
    int64_t begin = parts.begin();
    const int64_t end = parts.end();
    if (update.layout == kDense) {
      static_assert(kChunkAlignment % kBlock<T> == 0, "`begin` is a multiple of a block");
      static_assert(kChunkAlignment % kGroup == 0, "and of a group");
      const int64_t rest = end & -(groups != nullptr ? kGroup : kBlock<T>);
      if (begin < rest) whole.add({update.data, update.scales, begin, rest, update.first_element});
      if (rest < end) rests.add({update.data, update.scales, rest, end, update.first_element});
      const bool is_full = whole.count == kMaxPieces || rests.count == kMaxPieces ||
                           rests.elements > kTileElements - kBlock<T> ||
                           (groups != nullptr && rests.count > 0);
      if (is_full || step.in_order) update_pieces();
      continue;
    }
    const Layout& layout = step.layouts[update.layout];
    RowsAhead ahead(update, layout, begin, end);
    if (has_rows_of_blocks<T>(layout, update.formats)) {
      const int64_t size = layout.dims[1].size;
      for (int64_t row = begin / size; begin < end; ++row) {
        const int64_t to = end < (row + 1) * size ? end : (row + 1) * size;
        ahead.prefetch(begin);
        whole.add_row(update, layout, row, begin - row * size, to - row * size);
        if (whole.count == kMaxPieces || step.in_order) update_pieces();
        begin = to;
      }
      continue;
    }
    Cursor source(layout, begin), target(layout, begin);
    for (; begin < end; begin += kTileElements) {
      ahead.prefetch(begin);
      const int64_t n = end - begin < kTileElements ? end - begin : kTileElements;
      tile.load(update, source, n);
      tile.load_scales(update.scales, begin, n);
      update_tile(n);
      tile.store(update, target, n);
      tile.store_scales(update.scales, begin, n);
    }
  }
  update_pieces();
  return parts;
}

}  // namespace
}  // namespace fusedopt::cpu
