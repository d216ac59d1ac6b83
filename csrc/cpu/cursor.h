// Walks over strided operands. Part of isa_kernels.h, which says what must not be used here.
#pragma once

#include "core/layout.h"
#include "core/step.h"
#include "cpu/vec.h"

namespace fusedopt::cpu {
namespace {

// A position in a walk over strided operands, which goes on by runs along the innermost dim. Within
// a run, each operand has one stride.
class Cursor {
 public:
  Cursor(const Layout& layout, int64_t element) : layout_(layout) {
    for (int d = layout.num_dims - 1; d >= 0; --d) {
      index_[d] = element % layout.size_of(d);
      for (int k = 0; k <= kIndex; ++k)
        at_[k] += place(d, k, index_[d]) * layout.dims[d].strides[k];
      element /= layout.size_of(d);
    }
  }

  int64_t at(int operand) const { return at_[operand]; }
  int64_t stride(int operand) const { return inner() ? inner()->strides[operand] : 1; }
  int64_t left_in_run() const { return inner() ? inner()->size - index_[last_dim()] : 1; }

  // Goes on by n elements, which must not be more than left_in_run().
  void increment(int64_t n) {
    for (int d = last_dim(); d >= 0; --d, n = 1) {
      const int64_t from = index_[d], to = from + n < layout_.size_of(d) ? from + n : 0;
      index_[d] = to;
      for (int k = 0; k <= kIndex; ++k)
        at_[k] += (place(d, k, to) - place(d, k, from)) * layout_.dims[d].strides[k];
      if (to > 0) return;
    }
  }

 private:
  int last_dim() const { return layout_.num_dims - 1; }
  // Where along a dim an operand has what the walk visits at this index.
  int64_t place(int d, int operand, int64_t index) const {
    const bool is_row = d == 0 && layout_.rows != nullptr && operand != kGrad;
    return is_row ? layout_.rows[index] : index;
  }
  const Dim* inner() const { return last_dim() < 0 ? nullptr : layout_.dims + last_dim(); }

  const Layout& layout_;
  int64_t index_[kMaxDims] = {};
  int64_t at_[kMaxOperands + 1] = {};
};

// Has the memory of rows on its way before a walk comes to them: rows of a list lie anywhere, and
// the hardware cannot know where the next one is. No effect on other layouts.
class RowsAhead {
 public:
  RowsAhead(const ParamUpdate& update, const Layout& layout, int64_t begin, int64_t end)
      : update_(update), layout_(layout) {
    if (layout.rows == nullptr) return;
    for (int d = 1; d < layout.num_dims; ++d) row_elements_ *= layout.size_of(d);
    next_ = begin / row_elements_;
    end_ = (end + row_elements_ - 1) / row_elements_;
  }

  // For a walk that is at this element: the rows of the next kElements, and one more.
  void prefetch(int64_t element) {
    if (layout_.rows == nullptr) return;
    for (const int64_t last = (element + kElements) / row_elements_ + 1;
         next_ < end_ && next_ <= last; ++next_)
      for (int k = 0; k < kMaxOperands; ++k) {
        const int64_t size = item_size(update_.formats.dtypes[k]);
        if (size == 0 || k == kGrad) continue;  // grads have the rows side by side
        const char* const row = static_cast<const char*>(update_.data[k]) +
                                layout_.rows[next_] * layout_.dims[0].strides[k] * size;
        for (int64_t at = 0; at < row_elements_ * size && at < kMostBytes; at += kCacheLine)
          __builtin_prefetch(row + at, 1);
      }
  }

 private:
  static constexpr int64_t kElements = 1024;
  static constexpr int64_t kMostBytes = 512;  // of a row; more of it the hardware sees coming

  const ParamUpdate& update_;
  const Layout& layout_;
  int64_t row_elements_ = 1;
  int64_t next_ = 0, end_ = 0;
};

// Calls visit(offset, length, cursor) for each run of the next n elements, and moves behind them.
template <class Visit>
void for_each_run(Cursor& cursor, int64_t n, const Visit& visit) {
  for (int64_t done = 0; done < n;) {
    const int64_t left = n - done;
    const int64_t run = cursor.left_in_run() < left ? cursor.left_in_run() : left;
    visit(done, run, cursor);
    cursor.increment(run);
    done += run;
  }
}

}  // namespace
}  // namespace fusedopt::cpu
