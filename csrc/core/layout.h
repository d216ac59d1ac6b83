#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/rules.h"

// How the operands of one parameter lie in memory when plain consecutive order does not fit them.
namespace fusedopt {

// Operands of an update, in this order: param, grad, the states, and what else there is of a
// master weight (core/weight.h) and an average (core/average.h).
inline constexpr int kParam = 0;
inline constexpr int kGrad = 1;
inline constexpr int kFirstState = 2;
inline constexpr int kMaxOperands = kFirstState + kMaxStates + 2;
// Strides have one entry more, for the number of an element within its tensor.
inline constexpr int kIndex = kMaxOperands;

struct Dim {
  int64_t size;
  int64_t strides[kMaxOperands + 1];  // in elements; 0 for operands that are not there

  friend bool operator==(const Dim& a, const Dim& b) {
    return a.size == b.size && std::equal(a.strides, a.strides + kMaxOperands + 1, b.strides);
  }
};

// Outermost first; the empty list is one element.
using Dims = std::vector<Dim>;

// The same, borrowed.
struct Layout {
  const Dim* dims;
  int num_dims;
};
inline constexpr int kMaxDims = 64 + 1;  // torch's limit, and the two parts of a complex number

// Orders dims by the param's strides (largest first), drops those of size 1 and joins neighbours
// that every operand walks as one. Elements keep their partners; only the order of visits changes.
inline void coalesce(Dims& dims) {
  dims.erase(std::remove_if(dims.begin(), dims.end(), [](const Dim& d) { return d.size == 1; }),
             dims.end());
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

// True if coalesced dims are one run of consecutive elements in each of `num_operands` operands.
inline bool is_dense(const Dims& dims, int num_operands) {
  if (dims.empty()) return true;
  if (dims.size() > 1) return false;
  const int64_t* const strides = dims[0].strides;
  if (strides[kIndex] > 1) return false;
  return std::all_of(strides, strides + num_operands, [](int64_t stride) { return stride == 1; });
}

// Number of elements from an operand's first to its last, both included.
inline int64_t extent(const Dims& dims, int operand) {
  int64_t last = 0;
  for (const Dim& dim : dims) last += (dim.size - 1) * dim.strides[operand];
  return last + 1;
}

}  // namespace fusedopt
