#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/step.h"
#include "core/stochastic.h"
#include "cuda/access.h"
#include "cuda/lane.h"

// Single elements, straight from memory and back: of works that are not dense, before and after the
// pieces of others, and rare ones that are done again.
namespace fusedopt::cuda {

// What Elements asks of memory. A place that is taken twice is written twice, with the same bytes.
template <class T, int kCount, bool kIsDense>
class Singles {
 public:
  // `work` is in device memory: its pointers are loaded when they are needed, and take no
  // registers.
  FUSEDOPT_HD explicit Singles(const Work* work) : work_(work) {}

  // Takes an element of a dense work as number `j` of kCount.
  FUSEDOPT_HD void place(int j, int64_t element) {
    static_assert(kIsDense, "else there is a layout");
    at_[j][0] = element;
  }

  // Takes the one that the layout visits as number `element`; `is_small`: all numbers fit 31 bits.
  FUSEDOPT_HD void place(int j, const Layout& layout, int64_t element, bool is_small) {
#pragma unroll
    for (int64_t& at : at_[j]) at = 0;
    int64_t left = element;
#pragma unroll 1
    for (int d = layout.num_dims - 1; d >= 0; --d) {
      const Dim* const dim = layout.dims + d;
      const int64_t size = load_item(&dim->size);
      const int64_t outer = divide(left, size, is_small);
      const int64_t index = left - outer * size;
#pragma unroll
      for (int k = 0; k <= kIndex; ++k) at_[j][k] += index * load_item(dim->strides + k);
      left = outer;
    }
  }

  template <class Storage>
  FUSEDOPT_HD void load(int operand, T (&to)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      to[j] = fusedopt::load<T>(load_item(address<Storage>(operand, j)));
  }

  template <class Storage, class From>
  FUSEDOPT_HD void store(int operand, const From (&from)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Storage stored;
      fusedopt::store(stored, from[j]);
      store_item(address<Storage>(operand, j), stored);
    }
  }

  FUSEDOPT_HD void store_bfloat16(int operand, const float (&from)[kCount]) const {
    store<BFloat16>(operand, from);
  }

  FUSEDOPT_HD void load_words(int operand, uint32_t (&to)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = load_item(address<uint16_t>(operand, j));
  }

  FUSEDOPT_HD void store_words(int operand, const uint32_t (&from)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      store_item(address<uint16_t>(operand, j), static_cast<uint16_t>(from[j]));
  }

  FUSEDOPT_HD void find_draws(uint32_t rounding_key, uint32_t (&draws)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int64_t number = at_[j][kIsDense ? 0 : kIndex];
      draws[j] = own_draw(rounding_key, static_cast<uint64_t>(number));
    }
  }

 private:
  template <class Storage>
  FUSEDOPT_HD Storage* address(int operand, int j) const {
    return static_cast<Storage*>(load_item(work_->data + operand)) + at_[j][kIsDense ? 0 : operand];
  }

  const Work* const work_;
  int64_t at_[kCount][kIsDense ? 1 : kIndex + 1];
};

}  // namespace fusedopt::cuda
