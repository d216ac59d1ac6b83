// The operands of a parameter's update, and how they lie in memory where they are strided.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/macros.h"
#include "core/rules.h"

namespace fusedopt {

// The number of each operand: param, grad, the states as the rule numbers them, the float32 master
// or the remainder of a split one (core/weight.h), and the moving average (core/ema.h).
inline constexpr int kParam = 0;
inline constexpr int kGrad = 1;
inline constexpr int kFirstState = 2;
inline constexpr int kMaster = kFirstState + kMaxStates;
inline constexpr int kEma = kMaster + 1;
inline constexpr int kMaxOperands = kEma + 1;
// Strides have one entry more: it leads to the number of an element within its tensor, from which
// random draws are made (core/stochastic.h).
inline constexpr int kIndex = kMaxOperands;

// One dimension of all operands together.
struct Dim {
  int64_t size;
  int64_t strides[kMaxOperands + 1];  // in elements; 0 for operands that are not there

  friend bool operator==(const Dim& a, const Dim& b) {
    return a.size == b.size && std::equal(a.strides, a.strides + kMaxOperands + 1, b.strides);
  }
};

// All dims, outermost first. An empty list stands for a single element.
using Dims = std::vector<Dim>;

// The same, borrowed from elsewhere, and for device memory.
struct Layout {
  const Dim* dims;
  int num_dims;
  // Where only some rows are updated, slices along the outermost dim: their numbers. The grad has
  // these rows alone, one after the other. nullptr: all rows are. There is an inner dim then.
  const int64_t* rows = nullptr;
  int64_t num_rows = 0;

  // How many indices the walk along a dim has.
  FUSEDOPT_HD int64_t size_of(int d) const {
    return d == 0 && rows != nullptr ? num_rows : dims[d].size;
  }
};
inline constexpr int kMaxDims = 64 + 1;  // torch's limit, and the two parts of a complex number

// Simplifies dims: orders them by the param's strides (largest first), drops those of size 1, and
// joins neighbours that are one dim in every operand. Elements of different operands that belonged
// together still do; only the order in which they are visited changes, unless it must not.
inline void coalesce(Dims& dims, bool keeps_order = false) {
  dims.erase(std::remove_if(dims.begin(), dims.end(), [](const Dim& d) { return d.size == 1; }),
             dims.end());
  if (!keeps_order)
    std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
      return a.strides[kParam] > b.strides[kParam];
    });
  const auto joins = [](const Dim& outer, const Dim& inner) {
    for (int k = 0; k <= kIndex; ++k)
      if (outer.strides[k] != inner.strides[k] * inner.size) return false;
    return true;
  };
  size_t last = 0;
  for (size_t i = 1; i < dims.size(); ++i) {
    if (joins(dims[last], dims[i]))
      dims[i].size *= dims[last].size;
    else
      ++last;
    dims[last] = dims[i];
  }
  if (!dims.empty()) dims.resize(last + 1);
}

// True if coalesced dims are one run of consecutive elements in each of these operands, given as a
// set of bits.
inline bool is_dense(const Dims& dims, unsigned operands) {
  if (dims.empty()) return true;
  if (dims.size() > 1 || dims[0].strides[kIndex] > 1) return false;
  for (int k = 0; k < kMaxOperands; ++k)
    if ((operands >> k & 1) != 0 && dims[0].strides[k] != 1) return false;
  return true;
}

// Number of elements from an operand's first to its last in memory, both included.
inline int64_t extent(const Dims& dims, int operand) {
  int64_t last = 0;
  for (const Dim& dim : dims) last += (dim.size - 1) * dim.strides[operand];
  return last + 1;
}

}  // namespace fusedopt
