// What one thread does to find the norm of the grads. The tree of the sums is that of core/norm.h,
// the same on CPU and GPU. Here are its first level, the squares that a thread sums in its lanes of
// a leaf, and the last, the GradStatus. The levels between are in kernels.cuh and runtime.cu, as
// they take more than one thread.
#pragma once

#include <cstdint>

#include "core/norm.h"
#include "core/step.h"
#include "cuda/access.h"
#include "cuda/thread_slice.h"

namespace fusedopt::cuda {

// Arguments of the kernel that sums leaves. All pointers here are into device memory.
struct SumSquaresArguments {
  const ParamUpdate* updates;
  const ChunkStart* leaves;  // one more than there are; ChunkStart::update is a row of `updates`
  const Layout* layouts;
  PartialSum* sums;  // one for each leaf
};

// Arguments of the kernel that adds the leaves of one norm class up.
struct TotalArguments {
  const PartialSum* sums;
  int64_t num_leaves;
  int32_t norm_class;
  double* total;  // [squares, nonfinite] of that class
};

// What the GradStatus is made of.
struct FinalizeArguments {
  const double* total;
  const float* grad_scale;  // or nullptr
  const float* found_inf;   // or nullptr
  GradStatus* status;       // nullptr: other sums are still to be added before it can be known
  bool clips;
};

// A leaf of the tree: elements [begin, end) of one update's grad, in the order in which its layout
// visits them.
struct Leaf {
  ParamUpdate update;
  int64_t begin, end;
};

FUSEDOPT_HD Leaf load_leaf(const SumSquaresArguments& arguments, int64_t leaf) {
  const ChunkStart from = arguments.leaves[leaf], to = arguments.leaves[leaf + 1];
  const ParamUpdate update = load_update(arguments.updates + from.update);
  return {update, from.element, to.update == from.update ? to.element : update.numel};
}

// Whether the kernel that sums in T does this leaf: float64 grads are summed in double, all others
// in float. A leaf without a grad is done by both, which write the same 0.
template <class T>
FUSEDOPT_HD bool is_summed_in(const ParamUpdate& update) {
  const bool is_double = update.formats.dtypes[kGrad] == DType::kFloat64;
  return update.device == kIdle || is_double == (sizeof(T) == sizeof(double));
}

// The offset of the element that a strided layout visits as number `element`.
FUSEDOPT_HD int64_t find_grad(const Layout& layout, int64_t element, bool is_small) {
  int64_t at = 0;
  for (int d = layout.num_dims - 1; d >= 0; --d) {
    const Dim* const dim = layout.dims + d;
    const int64_t size = load_item(&dim->size);
    const int64_t outer = divide(element, size, is_small);
    at += (element - outer * size) * load_item(dim->strides + kGrad);
    element = outer;
  }
  return at;
}

// Calls add(lane, grad) for all grads of a thread: kV neighbours, one for each of its lanes, in
// every sweep of the block over the leaf. Aligned dense grads are loaded 16 bytes at a time, four
// loads ahead. All others, and what is left, are loaded one by one, and go to the same lanes in the
// same order: the bits of the sum do not depend on the alignment.
template <class Storage, class Add>
FUSEDOPT_HD void visit_grads(const Leaf& leaf, const Layout* layouts, uint32_t thread,
                             const Add& add) {
  using T = typename Compute<Storage>::Type;
  constexpr int kV = kLeafVector<Storage>;
  constexpr int64_t kLanes = kLeafThreads * kV;
  struct Vector {
    Storage values[kV];
  };
  const auto* const grads = static_cast<const Storage*>(leaf.update.data[kGrad]);
  const bool is_dense = leaf.update.layout == kDense;
  int64_t at = leaf.begin + thread * kV;
  if (is_dense && reinterpret_cast<uintptr_t>(grads + at) % sizeof(Words<4>) == 0) {
    const int64_t sweeps = (leaf.end - leaf.begin) / kLanes;
#pragma unroll 4
    for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
      const auto grads_at = bit_cast<Vector>(load_words<4>(grads + at + sweep * kLanes));
#pragma unroll
      for (int j = 0; j < kV; ++j) add(j, load<T>(grads_at.values[j]));
    }
    at += sweeps * kLanes;
  }
  for (; at < leaf.end; at += kLanes)
#pragma unroll
    for (int j = 0; j < kV; ++j)
      if (at + j < leaf.end) {
        const int64_t place = is_dense ? at + j
                                       : find_grad(layouts[leaf.update.layout], at + j,
                                                   leaf.update.numel <= INT32_MAX);
        add(j, load<T>(load_item(grads + place)));
      }
}

// Calls `f` with a value of the grad's storage type, one of those that are summed in T.
template <class T, class F>
FUSEDOPT_HD void with_grad_storage(const ParamUpdate& update, const F& f) {
  if constexpr (sizeof(T) == sizeof(double))
    f(double{});
  else
    with_storage<T>(update.formats.dtypes[kGrad], f);
}

// The squares of a thread's grads. From here on the tree is in double.
template <class T>
FUSEDOPT_HD double sum_thread(const Leaf& leaf, const Layout* layouts, uint32_t thread) {
  if (leaf.update.device == kIdle) return 0;
  double sum = 0;
  with_grad_storage<T>(leaf.update, [&](auto format) {
    using Storage = decltype(format);
    T lanes[kLeafVector<Storage>] = {};
    visit_grads<Storage>(leaf, layouts, thread,
                         [&](int j, T grad) { lanes[j] = add_square(lanes[j], grad); });
    sum = sum_lanes(lanes);
  });
  return sum;
}

// How many of a thread's grads are infinite or NaN. This takes another read of the leaf, and is
// only asked for if its sum is infinite or NaN: without such a grad, or an overflow, it is not.
template <class T>
FUSEDOPT_HD int32_t count_thread(const Leaf& leaf, const Layout* layouts, uint32_t thread) {
  int32_t count = 0;
  if (leaf.update.device == kIdle) return count;
  with_grad_storage<T>(leaf.update, [&](auto format) {
    visit_grads<decltype(format)>(leaf, layouts, thread,
                                  [&](int, T grad) { count += is_nonfinite(grad) ? 1 : 0; });
  });
  return count;
}

// Writes the GradStatus, for the whole device. One thread does it.
FUSEDOPT_HD void finalize_thread(const FinalizeArguments& arguments) {
  if (arguments.status == nullptr) return;
  const float scale = arguments.grad_scale != nullptr ? *arguments.grad_scale : 1.0f;
  const bool found_inf = arguments.found_inf != nullptr && *arguments.found_inf > 0;
  *arguments.status = finalize_norm(arguments.total[0], static_cast<int64_t>(arguments.total[1]),
                                    static_cast<double>(scale), found_inf, arguments.clips);
}

}  // namespace fusedopt::cuda
