// What one thread does to find the norm of the grads (core/norm.h): it sums the squares of its part
// of a leaf. What the threads of a block have is brought together in kernels.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtypes.h"
#include "core/norm.h"
#include "core/step.h"
#include "cuda/access.h"
#include "cuda/thread_slice.h"
#include "cuda/tuning.h"

namespace fusedopt::cuda {

// Arguments of the kernel that sums leaves. All pointers here are into device memory.
struct SumSquaresArguments {
  const ParamUpdate* updates;
  const ChunkStart* leaves;  // one more than there are; ChunkStart::update is a row of `updates`
  const Layout* layouts;
  NormSums* sums;  // of each norm class
};

// What the GradStatus is made of.
struct FinalizeArguments {
  const NormSums* sums;
  const float* grad_scale;  // or nullptr: then it is the host's
  double host_grad_scale;
  const float* found_inf;  // or nullptr
  GradStatus* status;
  bool clips;
};

// A leaf: elements [begin, end) of one update's grad, in the order in which its layout visits them.
struct Leaf {
  ParamUpdate update;
  int64_t begin, end;
};

FUSEDOPT_HD Leaf load_leaf(const SumSquaresArguments& arguments, int64_t leaf) {
  const ChunkStart from = arguments.leaves[leaf], to = arguments.leaves[leaf + 1];
  // Where the compiler knows the size, a power of two, nvcc 13.0 spills registers on sm_100.
  const int64_t at = from.update * opaque(static_cast<uint32_t>(sizeof(ParamUpdate)));
  const ParamUpdate update = load_update(
      reinterpret_cast<const ParamUpdate*>(reinterpret_cast<const char*>(arguments.updates) + at));
  return {update, from.element, to.update == from.update ? to.element : update.numel};
}

// The offset of the element that a strided layout visits as number `element`.
FUSEDOPT_HD int64_t find_grad(const Layout& layout, int64_t element, bool is_small) {
  int64_t at = 0;
  for_each_index(layout, element, is_small, [&](int, const Dim* dim, int64_t index) {
    at += index * load_item(dim->strides + kGrad);
  });
  return at;
}

// The squares of one thread.
template <class T>
struct ThreadSum {
  Word<T> slices[kSlices<T>] = {};
  int32_t count = 0;  // of squares that have been added
  int32_t bin = -kTopBin<T>;

  template <bool kExact, int kCount>
  FUSEDOPT_HD void add(const T (&grads)[kCount], NormSums& sums) {
    Word<T> added[kSlices<T>];
    if (!sum_slices<kExact>(grads, added)) {
      if (!raise_for(grads, sums)) return;
      sum_slices<kExact>(grads, added);
    }
#pragma unroll
    for (int k = 0; k < kSlices<T>; ++k) slices[k] += added[k];
    count += kCount;
  }

  // Makes `higher` the bin of the first slice. Those that are then too low are dropped.
  FUSEDOPT_HD void raise(int higher) {
#pragma unroll
    for (int k = 0; k < kSlices<T>; ++k)
      slices[k] = static_cast<Word<T>>(slice_sum<T>(slices[k], count, k));
    count = 0;
    for (int step = 0; step < kSlices<T> && step < higher - bin; ++step) {
#pragma unroll
      for (int k = kSlices<T> - 1; k > 0; --k) slices[k] = slices[k - 1];
      slices[0] = 0;
    }
    bin = higher;
  }

 private:
  // Returns whether no square is above the bin.
  template <bool kExact, int kCount>
  FUSEDOPT_HD bool sum_slices(const T (&grads)[kCount], Word<T> (&to)[kSlices<T>]) const {
    const T scale = norm_scale<T>(bin);
    Word<T> seen = 0;
#pragma unroll
    for (int k = 0; k < kSlices<T>; ++k) to[k] = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) add_square<T, kExact>(grads[j] * scale, to, seen);
    return seen <= kMostSeen<T, kExact>;
  }

  // For grads of which one is above the bin, or not finite: these are counted, the others need not
  // be added then, and the result is false.
  template <int kCount>
  FUSEDOPT_HD bool raise_for(const T (&grads)[kCount], NormSums& sums) {
    Magnitudes<T> found;
#pragma unroll
    for (int j = 0; j < kCount; ++j) found.add(grads[j]);
    if (found.infinite > 0) add_to(sums.infinite, found.infinite);
    if (found.nan > 0) add_to(sums.nan, found.nan);
    if (found.are_finite()) raise(own_bin<T>(found.largest));
    return found.are_finite();
  }
};

// The numbers in 16 bytes.
template <class Storage, class T, int kV>
FUSEDOPT_HD void unpack(const Words<4>& words, T (&to)[kV]) {
  struct Vector {
    Storage values[kV];
  };
#pragma unroll
  for (int j = 0; j < kV; ++j)
    if constexpr (std::is_same_v<Storage, BFloat16>)
      to[j] = static_cast<T>(float_from_pair(words.words[j / 2], j % 2 != 0));
    else
      to[j] = load<T>(bit_cast<Vector>(words).values[j]);
}

// Adds all grads of a thread: kV neighbours in every sweep of the block over the leaf. Aligned
// dense grads are loaded 16 bytes at a time, four loads ahead. All others, and what is left, are
// loaded one by one.
template <class Storage, class T>
FUSEDOPT_HD void add_grads(const Leaf& leaf, const Layout* layouts, uint32_t thread,
                           ThreadSum<T>& sum, NormSums& sums) {
  constexpr int kV = 16 / static_cast<int>(sizeof(Storage)), kAhead = 4;
  constexpr int64_t kSweep = kBlockThreads * kV;
  constexpr bool kExact = kHasExactSquares<Storage>;
  static_assert(kLeafElements / kBlockThreads + kV <= FloatBits<T>::kMostSquares);
  const auto* const grads = static_cast<const Storage*>(leaf.update.data[kGrad]);
  const bool is_dense = leaf.update.layout == kDense;
  int64_t at = leaf.begin + thread * kV;
  if (is_dense && reinterpret_cast<uintptr_t>(grads + at) % sizeof(Words<4>) == 0)
    for (; at + (kAhead - 1) * kSweep + kV <= leaf.end; at += kAhead * kSweep) {
      Words<4> ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) ahead[i] = load_words<4>(grads + at + i * kSweep);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        T values[kV];
        unpack<Storage>(ahead[i], values);
        sum.template add<kExact>(values, sums);
      }
    }
  constexpr int kSingles = kV < 4 ? kV : 4;
  for (; at < leaf.end; at += kSweep)
#pragma unroll 1
    for (int64_t first = at; first < at + kV && first < leaf.end; first += kSingles) {
      T singles[kSingles] = {};
#pragma unroll
      for (int j = 0; j < kSingles; ++j) {
        if (first + j >= leaf.end) continue;
        const int64_t place = is_dense ? first + j
                                       : find_grad(layouts[leaf.update.layout], first + j,
                                                   leaf.update.numel <= INT32_MAX);
        singles[j] = load<T>(load_item(grads + place));
      }
      sum.template add<kExact>(singles, sums);
    }
}

// The squares of a thread's grads. What is not finite is counted at once, in the sums of its class.
template <class T>
FUSEDOPT_HD ThreadSum<T> sum_thread(const Leaf& leaf, const Layout* layouts, uint32_t thread,
                                    NormSums& sums) {
  ThreadSum<T> sum;
  if constexpr (sizeof(T) == sizeof(double))
    add_grads<double>(leaf, layouts, thread, sum, sums);
  else
    with_storage<T>(leaf.update.formats.dtypes[kGrad], [&](auto format) {
      add_grads<decltype(format)>(leaf, layouts, thread, sum, sums);
    });
  return sum;
}

// Writes the GradStatus, for the whole device, from the sums and their highest bins. One thread
// does it.
FUSEDOPT_HD void finalize_thread(const FinalizeArguments& arguments, const HighestBins& highest) {
  const double scale = arguments.grad_scale != nullptr ? static_cast<double>(*arguments.grad_scale)
                                                       : arguments.host_grad_scale;
  const bool found_inf = arguments.found_inf != nullptr && *arguments.found_inf > 0;
  *arguments.status = finalize_norm(*arguments.sums, highest, scale, found_inf, arguments.clips);
}

}  // namespace fusedopt::cuda
