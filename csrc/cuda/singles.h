// Loads and stores elements one at a time, straight from and to global memory: elements of strided
// updates, those before and after the pieces of dense ones, and those that have to be computed
// again because a rare operand was among them.
#pragma once

#include <cstdint>

#include "core/codes.h"
#include "core/element.h"
#include "core/step.h"
#include "core/stochastic.h"
#include "cuda/access.h"
#include "cuda/thread_slice.h"
#include "cuda/tuning.h"
#include "cuda/usual.h"

namespace fusedopt::cuda {

// `Memory` of core/element.h for kCount elements that may lie anywhere. One that is placed twice is
// computed and written twice, with the same bytes. Where there are codes, a warp's elements are one
// group; those that other lanes write as well are muted here.
template <class T, int kCount, class Kind>
class Singles {
  using Bits = Pack<uint32_t, kCount>;

 public:
  using Values = Pack<T, kCount>;
  static constexpr bool kRoundsForNothing = true;
  static constexpr bool kSplitIsOneFormat = false;
  static constexpr bool kHasCodes = Kind::kHasCodes;
  static constexpr bool kLooksAtNumbers = false;  // store_bfloat16() rounds

  FUSEDOPT_HD DType one_format() const { return DType::kAbsent; }
  FUSEDOPT_HD Formats formats() const {
    return formats_of_step<Kind>(
        bit_cast<Formats>(fusedopt::cuda::load_words<2>(&update_->formats)));
  }

  // `update` is in device memory. Its pointers and formats are loaded each time they are needed,
  // and so take no registers meanwhile; they come from the cache.
  FUSEDOPT_HD Singles(const ParamUpdate* update, const Layout* layouts)
      : update_(update), layouts_(layouts) {}

  FUSEDOPT_HD void mute(int j) { is_muted_[j] = true; }

  // Makes the element that the layout visits as number `element` the j-th of kCount: finds its
  // index along each dim, innermost first, and from that its offset in every operand.
  FUSEDOPT_HD void place(int j, int64_t element) {
    const int32_t number = Kind::kIsUsual ? kDense : load_item(&update_->layout);
#pragma unroll
    for (int64_t& at : at_[j]) at = number == kDense ? element : 0;
    if (number == kDense) return;
    const Layout layout = layouts_[number];
    const bool is_small = load_item(&update_->numel) <= INT32_MAX;
    for_each_index(layout, element, is_small, [&](int d, const Dim* dim, int64_t index) {
      const int64_t row = d == 0 && layout.rows != nullptr ? load_item(layout.rows + index) : index;
#pragma unroll
      for (int k = 0; k <= kIndex; ++k)
        at_[j][k] += (k == kGrad ? index : row) * load_item(dim->strides + k);
    });
  }

  template <class Storage, bool>
  FUSEDOPT_HD void load(int operand, Values& to) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      to[j] = fusedopt::load<T>(load_item(address<Storage>(operand, j)));
  }

  template <class Storage, bool, class From>
  FUSEDOPT_HD void store(int operand, const Pack<From, kCount>& from) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Storage stored;
      fusedopt::store(stored, from[j]);
      if (writes(j)) store_item(address<Storage>(operand, j), stored);
    }
  }

  template <bool>
  FUSEDOPT_HD void store_bfloat16(int operand, const Pack<float, kCount>& from) const {
    store<BFloat16, false>(operand, from);
  }

  template <bool>
  FUSEDOPT_HD void load_words(int operand, Bits& to) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = load_item(address<uint16_t>(operand, j));
  }

  template <bool>
  FUSEDOPT_HD void store_words(int operand, const Bits& from) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (writes(j)) store_item(address<uint16_t>(operand, j), static_cast<uint16_t>(from[j]));
  }

  FUSEDOPT_HD void load_signed_bytes(int operand, Bits& to) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      to[j] = signed_byte_of(load_item(address<uint8_t>(operand, j)), 0);
  }

  template <int kByte>
  FUSEDOPT_HD void store_bytes(int operand, const Bits& from) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (writes(j))
        store_item(address<uint8_t>(operand, j), static_cast<uint8_t>(from[j] >> 8 * kByte));
  }

  template <class Code>
  FUSEDOPT_HD void load_codes(int operand, Pack<float, kCount>& to) const {
    Bits codes;
#pragma unroll
    for (int j = 0; j < kCount; ++j) codes[j] = load_item(address<uint8_t>(operand, j));
    to = decoded<Code, Pack<float, kCount>>(codes, load_item(scale_place(operand)));
  }

  template <class Code>
  FUSEDOPT_HD void store_codes(int operand, const Pack<float, kCount>& from,
                               const Bits& fractions) const {
    const uint32_t largest = as_bits(largest_magnitude<sizeof(T) == sizeof(float)>(from));
    const float scale = scale_of(largest_of_lanes(largest, kWarp));
    BranchFree<> math;
    const Bits codes = encoded<Code>(from, units_in<Code>(scale, math), fractions);
    store_bytes<3>(operand, codes & Bits(scale > 0 ? 0xffffffffu : 0));
    if (writes(0) && at_[0][operand] % kGroup == 0) store_item(scale_place(operand), scale);
  }

  FUSEDOPT_HD void find_draws(uint32_t rounding_key, Bits& draws) const {
    const int64_t first = load_item(&update_->first_element);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      draws[j] = own_draw(rounding_key, static_cast<uint64_t>(first + at_[j][kIndex]));
  }

 private:
  FUSEDOPT_HD bool writes(int j) const { return !kHasCodes || !is_muted_[j]; }

  template <class Storage>
  FUSEDOPT_HD Storage* address(int operand, int j) const {
    return static_cast<Storage*>(load_item(update_->data + operand)) + at_[j][operand];
  }

  // Codes lie in the order of the elements, whatever the layout.
  FUSEDOPT_HD float* scale_place(int operand) const {
    return load_item(update_->scales + (operand - kFirstState)) + at_[0][operand] / kGroup;
  }

  const ParamUpdate* const update_;
  const Layout* const layouts_;
  bool is_muted_[kCount] = {};
  int64_t at_[kCount][kIndex + 1];  // each element's offset in each operand, and its number
};

}  // namespace fusedopt::cuda
