#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/rules.h"

// How the operands of one parameter lie in memory when plain consecutive order does not fit them.
namespace fusedopt {

// Operands of an update, each in a place of its own: param, grad, the states as the rule numbers
// them, what else there is of a master weight (core/weight.h) and an average (core/average.h).
inline constexpr int kParam = 0;
inline constexpr int kGrad = 1;
inline constexpr int kFirstState = 2;
inline constexpr int kMaster = kFirstState + kMaxStates;
inline constexpr int kEma = kMaster + 1;
inline constexpr int kMaxOperands = kEma + 1;
// Strides have one entry more, for the number of an element within its tensor.
inline constexpr int kIndex = kMaxOperands;

struct Dim {
  int64_t size;
  int64_t strides[kMaxOperands + 1];  // in elements; 0 for operands that are not there

  friend bool operator==(const Dim& a, const Dim& b) {
    return a.size == b.size && std::equal(a.strides, a.strides + kMaxOperands + 1, b.strides);
  }
};

// That of operands which lie consecutively.
inline Dim consecutive(int64_t size) {
  Dim dim = {size, {}};
  for (int64_t& stride : dim.strides) stride = 1;
  return dim;
}

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

// True if coalesced dims are one run of consecutive elements in each of these operands, a bit for
// each.
inline bool is_dense(const Dims& dims, unsigned operands) {
  if (dims.empty()) return true;
  if (dims.size() > 1 || dims[0].strides[kIndex] > 1) return false;
  for (int k = 0; k < kMaxOperands; ++k)
    if ((operands >> k & 1) != 0 && dims[0].strides[k] != 1) return false;
  return true;
}

// Number of elements from an operand's first to its last, both included.
inline int64_t extent(const Dims& dims, int operand) {
  int64_t last = 0;
  for (const Dim& dim : dims) last += (dim.size - 1) * dim.strides[operand];
  return last + 1;
}

}  // namespace fusedopt
