// Sums the squares of grads on a CPU, in the tree of core/norm.h. Part of isa_kernels.h, which says
// what must not be used here.
#pragma once

#include "core/dtypes.h"
#include "core/flush.h"
#include "core/norm.h"
#include "core/step.h"
#include "cpu/cursor.h"
#include "cpu/update.h"

namespace fusedopt::cpu {
namespace {

// How far ahead memory is asked for. A loop that only reads needs it earlier than an update, which
// does more between two reads (cpu/update.h).
constexpr int kNormPrefetchBytes = 4096;

// Copies n elements that are `stride` apart, as T.
template <class T>
void gather(T* to, const void* from, DType dtype, int64_t at, int64_t stride, int64_t n) {
  with_storage<double>(dtype, [=](auto format) {
    using Storage = decltype(format);
    const Storage* const source = static_cast<const Storage*>(from) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = load<T>(source[i * stride]);
  });
}

// Calls visit(grads as T, offset in the leaf, n) for elements [begin, end), a tile at a time.
template <class T, class Visit>
void visit_strided(const ParamUpdate& update, const Layout& layout, int64_t begin, int64_t end,
                   const Visit& visit) {
  T tile[kTileElements];
  Cursor cursor(layout, begin);
  for (int64_t at = begin; at < end; at += kTileElements) {
    const int64_t n = end - at < kTileElements ? end - at : kTileElements;
    for_each_run(cursor, n, [&](int64_t offset, int64_t run, const Cursor& from) {
      gather(tile + offset, update.data[kGrad], update.formats.dtypes[kGrad], from.at(kGrad),
             from.stride(kGrad), run);
    });
    visit(tile, at - begin, n);
  }
}

// Adds the squares of as many consecutive grads as there are lanes, a register at a time.
template <class Storage, int kLanes, class T>
FUSEDOPT_HD void add_to_all(T (&lanes)[kLanes], const Storage* grads) {
  using V = Register<T>;
  constexpr int kBytes = kBlock<T> * sizeof(Storage);
  const char* const from = reinterpret_cast<const char*>(grads);
  for (int i = 0; i < kLanes / kBlock<T>; ++i) {
    V values[kCount], sums[kCount];
    Stored<V, Storage>::load(from + i * kBytes, values);
    for (int byte = 0; byte < kBytes; byte += kCacheLine)
      __builtin_prefetch(from + i * kBytes + byte + kNormPrefetchBytes);
    Stored<V, T>::load(reinterpret_cast<const char*>(lanes) + i * sizeof(sums), sums);
    for (int j = 0; j < kCount; ++j) sums[j] = add_square(sums[j], values[j]);
    Stored<V, T>::store(reinterpret_cast<char*>(lanes) + i * sizeof(sums), sums);
  }
}

// The lanes of a leaf, and from them the sums of its threads. Each lane adds
// its elements in the same order, however wide the registers are, so the bits are those of a GPU.
// Returns how many threads have a sum.
template <class Storage>
int sum_squares(const ParamUpdate& update, const Layout* layouts, int64_t begin, int64_t end,
                double* threads) {
  using T = typename Compute<Storage>::Type;
  constexpr int kV = kLeafVector<Storage>, kLanes = kLeafThreads * kV;
  const int64_t size = end - begin;
  const int used = size < kLanes ? static_cast<int>((size + kV - 1) / kV) : kLeafThreads;
  T lanes[kLanes];
  for (int i = 0; i < used * kV; ++i) lanes[i] = 0;
  const auto add = [&](const auto* grads, int64_t first, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i)
      lanes[first + i] = add_square(lanes[first + i], load<T>(grads[i]));
  };
  static_assert(kLanes % kTileElements == 0, "a tile must not go beyond the last lane");
  if (update.layout == kDense) {
    const Storage* const grads = static_cast<const Storage*>(update.data[kGrad]) + begin;
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t at = 0; at < whole; at += kLanes) add_to_all<Storage, kLanes>(lanes, grads + at);
    add(grads + whole, 0, size - whole);
  } else {
    visit_strided<T>(update, layouts[update.layout], begin, end,
                     [&](const T* grads, int64_t at, int64_t n) { add(grads, at % kLanes, n); });
  }
  // sum_lanes() (core/norm.h) for all threads at once.
  for (int width = kV / 2; width > 0; width /= 2)
#pragma GCC ivdep
    for (int i = 0; i < used * width; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  for (int t = 0; t < used; ++t) threads[t] = static_cast<double>(lanes[t]);
  return used;
}

int sum_leaf(const ParamUpdate& update, const Layout* layouts, int64_t begin, int64_t end,
             double* threads) {
  int used = 0;
  const FlushMode mode(update.formats.dtypes[kGrad] != DType::kFloat64);
  with_storage<double>(update.formats.dtypes[kGrad], [&](auto format) {
    used = sum_squares<decltype(format)>(update, layouts, begin, end, threads);
  });
  return used;
}

int64_t count_nonfinite(const ParamUpdate& update, const Layout* layouts, int64_t begin,
                        int64_t end) {
  const Dim line = consecutive(update.numel);
  const Layout layout = update.layout == kDense ? Layout{&line, 1} : layouts[update.layout];
  int64_t count = 0;
  visit_strided<double>(update, layout, begin, end, [&](const double* grads, int64_t, int64_t n) {
    for (int64_t i = 0; i < n; ++i) count += is_nonfinite(grads[i]) ? 1 : 0;
  });
  return count;
}

}  // namespace
}  // namespace fusedopt::cpu
