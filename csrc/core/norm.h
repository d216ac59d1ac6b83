// The global norm of the grads. Floating-point sums depend on their order, so all drivers sum in
// one fixed tree, whatever the number of threads.
//
// A tensor is cut into leaves. The squares of a leaf are summed in lanes: element i goes to lane i
// mod (kLeafThreads kV), where kV elements take 16 bytes, as a GPU's block reads them with 128-bit
// loads. Neighbouring lanes are those of one thread. Its sum, in double from there on, goes up
// through the warps to the sum of the leaf. The sums of the leaves are summed in the same way, in
// one lane for each thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/chunks.h"
#include "core/dtypes.h"
#include "core/lanes.h"
#include "core/macros.h"

namespace fusedopt {

inline constexpr int kTreeWidth = 32;  // a warp of a GPU
inline constexpr int kLeafThreads = 128;
inline constexpr int kTotalThreads = 1024;
inline constexpr int64_t kMinLeafElements = 8192;
inline constexpr int64_t kMaxLeaves = 1024;  // of one tensor, about

// kV: elements in 16 bytes.
template <class Storage>
inline constexpr int kLeafVector = 16 / static_cast<int>(sizeof(Storage));

// The result of one leaf.
struct PartialSum {
  double squares;
  int32_t nonfinite;   // elements that are infinite or NaN
  int32_t norm_class;  // as ParamUpdate::norm_class
};

// Cuts grads of these sizes into leaves. One more start than there are leaves is the end.
inline std::vector<ChunkStart> plan_leaves(const std::vector<int64_t>& sizes) {
  std::vector<ChunkStart> starts;
  const auto num_updates = static_cast<int64_t>(sizes.size());
  for (int64_t update = 0; update < num_updates; ++update) {
    const int64_t size = sizes[static_cast<size_t>(update)];
    const int64_t leaf = (size / (kMinLeafElements * kMaxLeaves) + 1) * kMinLeafElements;
    for (int64_t element = 0; element < size; element += leaf) starts.push_back({update, element});
  }
  starts.push_back({num_updates, 0});
  return starts;
}

template <class T>
FUSEDOPT_HD T add_square(T sum, T grad) {
  return fma(grad, grad, sum);
}

template <class T>
FUSEDOPT_HD bool is_nonfinite(T value) {
  return value - value != 0;
}

// The sum of one thread's lanes, in their type and only then in double.
template <class T, int kV>
FUSEDOPT_HD double sum_lanes(const T (&lanes)[kV]) {
  T sums[kV];
  for (int j = 0; j < kV; ++j) sums[j] = lanes[j];
  for (int width = 1; width < kV; width *= 2)
    for (int j = 0; j < kV; j += 2 * width) sums[j] += sums[j + width];
  return static_cast<double>(sums[0]);
}

// The sum of the values of one warp's threads, of which the first `count` have a value. It
// overwrites the values.
inline double sum_warp(double* values, int count) {
  for (int t = count; t < kTreeWidth; ++t) values[t] = 0;
  for (int width = kTreeWidth / 2; width > 0; width /= 2)
    for (int t = 0; t < width; ++t) values[t] += values[t + width];
  return values[0];
}

// The same for a block of whole warps, of which the first `count` threads have a value.
inline double sum_block(double* values, int count) {
  double warps[kTreeWidth] = {};
  for (int first = 0; first < count; first += kTreeWidth)
    warps[first / kTreeWidth] = sum_warp(values + first, std::min(kTreeWidth, count - first));
  return sum_warp(warps, kTreeWidth);
}

// Adds up all leaves of one norm class: the squares, and how many elements are not finite.
inline void sum_leaves(const PartialSum* leaves, int64_t num_leaves, int32_t norm_class,
                       double* total) {
  double values[kTotalThreads] = {};
  int64_t nonfinite = 0;
  for (int64_t i = 0; i < num_leaves; ++i) {
    if (leaves[i].norm_class != norm_class) continue;
    values[i % kTotalThreads] += leaves[i].squares;
    nonfinite += leaves[i].nonfinite;
  }
  total[0] = sum_block(values, kTotalThreads);
  total[1] = static_cast<double>(nonfinite);
}

// What is known of all grads before a step, and whether the step takes place.
struct GradStatus {
  double grad_norm;  // of the grads divided by grad_scale
  int64_t nonfinite;
  float skip;  // above 0: the step changes nothing
  float unused;
};

// Decides from the sums. With `clips`, a norm that is not finite, by an overflow of the squares for
// example, is a reason to skip as well.
FUSEDOPT_HD GradStatus finalize_norm(double squares, int64_t nonfinite, double grad_scale,
                                     bool found_inf, bool clips) {
  const double norm = std::sqrt(squares) / grad_scale;
  const bool skips = found_inf || nonfinite > 0 || (clips && is_nonfinite(norm));
  return {norm, nonfinite, skips ? 1.0f : 0.0f, 0};
}

}  // namespace fusedopt
