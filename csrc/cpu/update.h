// The loops of a step: the updates of a chunk, a block of elements at a time. Part of
// isa_kernels.h, which says what must not be used here.
#pragma once

#include "core/element.h"
#include "core/step.h"
#include "cpu/block.h"
#include "cpu/cursor.h"
#include "cpu/parts.h"
#include "cpu/tile.h"

namespace fusedopt::cpu {
namespace {

// Pieces of whole blocks, and of whole groups where there are codes; an end is rounded up to one.
// Not inlined, so that there is one copy for its two callers.
template <class Rule, class T, bool kCodes>
__attribute__((noinline)) void update_blocks(typename Rule::Variant variant,
                                             const StepScalars<Rule, T>& scalars,
                                             const BlockSetup& setup, const Piece* pieces,
                                             int count) {
  using Block = cpu::Block<T, kCodes>;
  for (int i = 0; i < count; ++i) {
    const Piece piece = pieces[i];  // a copy, which the stores below cannot change
    const int64_t whole = kCodes ? (piece.end + kGroup - 1) & -kGroup : piece.end;
    for (Block block(setup, piece); block.at < whole;) {
      const int64_t begin = block.at, end = kCodes ? Block::end_of_kept(begin, whole) : whole;
      for (; block.at < end; block.at += kBlock<T>) {
        // No prefetch beyond the end: those cache lines may be another thread's.
        block.ahead = block.at + kPrefetchAhead + kBlock<T> <= piece.end ? kPrefetchAhead : 0;
        Elements<Rule, T, typename Block::Values, Block> elements(block);
        Ieee math;
        elements.load();
        elements.apply(variant, scalars.rule, math);
        elements.finish(scalars.common);
      }
      if constexpr (kCodes) block.encode(begin, end < piece.end ? end : piece.end);
    }
  }
}

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

// Whether what has been prepared for one update does for the other.
bool are_alike(const ParamUpdate& a, const ParamUpdate& b) {
  return a.scalars == b.scalars && a.rule == b.rule && a.variant == b.variant &&
         __builtin_memcmp(&a.formats, &b.formats, sizeof(Formats)) == 0;
}

// Makes updates that are alike, for which scalars and buffers are prepared once. Blocks of several
// updates are gathered, and what is left of these fills blocks of its own.
template <class Rule, class T>
class AlikeUpdates {
 public:
  AlikeUpdates(const Step& step, const ParamUpdate& first)
      : step_(step),
        variant_(Rule::Variant::of(first.variant)),
        scalars_(step.scalars[first.scalars].template of<Rule>().template as<T>()),
        formats_(first.formats),
        has_codes_(formats_.has_codes()),
        one_format_(formats_.one_format(Block<T, false>::kSplitIsOneFormat)),
        tile_(formats_, one_format_, scalars_.common.rounding_key) {}

  // Elements [begin, end) of an update. Those that are gathered wait for flush().
  void add(const ParamUpdate& update, int64_t begin, int64_t end) {
    if (update.layout == kDense) return add_dense(update, begin, end);
    const Layout& layout = step_.layouts[update.layout];
    if (has_rows_of_blocks<T>(layout, update.formats))
      add_rows(update, layout, begin, end);
    else
      update_strided(update, layout, begin, end);
  }

  void flush() {
    if (whole_.count > 0)
      update_blocks({formats_, one_format_, nullptr, kept_}, whole_.list, whole_.count);
    if (rests_.count > 0) {
      const Piece& rest = rests_.list[0];  // the only one where there are codes
      tile_.load(rests_);
      tile_.load_scales(rest.scales, rest.begin, rests_.elements);
      update_tile(rests_.elements);
      tile_.store(rests_);
      tile_.store_scales(rest.scales, rest.begin, rests_.elements);
    }
    whole_.count = rests_.count = 0;
    rests_.elements = 0;
  }

 private:
  void add_dense(const ParamUpdate& update, int64_t begin, int64_t end) {
    static_assert(kChunkAlignment % kBlock<T> == 0, "`begin` is a multiple of a block");
    static_assert(kChunkAlignment % kGroup == 0, "and of a group");
    const int64_t rest = end & -(has_codes_ ? kGroup : kBlock<T>);
    if (begin < rest) whole_.add({update.data, update.scales, begin, rest, update.first_element});
    if (rest < end) rests_.add({update.data, update.scales, rest, end, update.first_element});
    const bool is_full = whole_.count == kMaxPieces || rests_.count == kMaxPieces ||
                         rests_.elements > kTileElements - kBlock<T> ||
                         (has_codes_ && rests_.count > 0);
    if (is_full || step_.in_order) flush();
  }

  // Rows of the layout's list, each of whole blocks.
  void add_rows(const ParamUpdate& update, const Layout& layout, int64_t begin, int64_t end) {
    RowsAhead ahead(update, layout, begin, end);
    const int64_t size = layout.dims[1].size;
    for (int64_t row = begin / size; begin < end; ++row) {
      const int64_t to = end < (row + 1) * size ? end : (row + 1) * size;
      ahead.prefetch(begin);
      whole_.add_row(update, layout, row, begin - row * size, to - row * size);
      if (whole_.count == kMaxPieces || step_.in_order) flush();
      begin = to;
    }
  }

  void update_strided(const ParamUpdate& update, const Layout& layout, int64_t begin, int64_t end) {
    RowsAhead ahead(update, layout, begin, end);
    Cursor source(layout, begin), target(layout, begin);
    for (; begin < end; begin += kTileElements) {
      ahead.prefetch(begin);
      const int64_t n = end - begin < kTileElements ? end - begin : kTileElements;
      tile_.load(update, source, n);
      tile_.load_scales(update.scales, begin, n);
      update_tile(n);
      tile_.store(update, target, n);
      tile_.store_scales(update.scales, begin, n);
    }
  }

  void update_tile(int64_t n) {
    const Piece piece = tile_.piece(n);
    update_blocks(tile_.setup(kept_), &piece, 1);
  }

  void update_blocks(const BlockSetup& setup, const Piece* pieces, int count) {
    if (has_codes_)
      cpu::update_blocks<Rule, T, true>(variant_, scalars_, setup, pieces, count);
    else
      cpu::update_blocks<Rule, T, false>(variant_, scalars_, setup, pieces, count);
  }

  const Step& step_;
  const typename Rule::Variant variant_;
  const StepScalars<Rule, T> scalars_;
  const Formats formats_;
  const bool has_codes_;
  const DType one_format_;
  Pieces whole_, rests_;  // of blocks, and what is left
  NewValues kept_[kMaxStates];
  Tile<T> tile_;
};

// The part that is at hand and those after it that are like it. Returns what is left. Not inlined,
// so that nothing is computed before the caller has set the mode.
template <class Rule, class T>
__attribute__((noinline)) Parts update_alike(const Step& step, Parts parts) {
  const ParamUpdate& first = parts.update();
  AlikeUpdates<Rule, T> updates(step, first);
  for (; !parts.done() && are_alike(first, parts.update()); parts.next())
    updates.add(parts.update(), parts.begin(), parts.end());
  updates.flush();
  return parts;
}

}  // namespace
}  // namespace fusedopt::cpu
