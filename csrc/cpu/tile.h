// Elements that lie in any way, gathered in tiles. Part of isa_kernels.h, which says what must not
// be used here.
#pragma once

#include "core/step.h"
#include "cpu/block.h"
#include "cpu/cursor.h"

namespace fusedopt::cpu {
namespace {

// Pieces that are updated at once, enough that the preparations for them do not count.
constexpr int kMaxPieces = 64;

// Elements that do not lie as a block does are gathered in tiles of so many.
constexpr int64_t kTileElements = 256;

// Pieces that are updated at once.
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

  BlockSetup setup(NewValues* kept) const {
    // kAbsent: the elements are in order in the registers, as the draws are.
    return {formats_, formats_.stochastic == 0 ? one_format_ : DType::kAbsent, draws_, kept};
  }
  Piece piece(int64_t n) const { return {data_, scales_, 0, n, 0}; }

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

}  // namespace
}  // namespace fusedopt::cpu
