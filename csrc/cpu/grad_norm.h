// Sums the squares of grads on a CPU (core/norm.h). Part of isa_kernels.h, which says what must not
// be used here.
#pragma once

#include "core/dtypes.h"
#include "core/flush.h"
#include "core/norm.h"
#include "core/step.h"
#include "cpu/block.h"
#include "cpu/cursor.h"
#include "cpu/isa.h"
#include "cpu/parts.h"

namespace fusedopt::cpu {
namespace {

// Squares of a lane, and of all lanes, that are summed before the sums are looked at: few enough
// that their grads are still in the cache if they have to be read again.
constexpr int64_t kLaneRun = 960;
constexpr int64_t kRun = kLaneRun * kRegisterBytes / static_cast<int64_t>(sizeof(float));
static_assert(kLaneRun <= FloatBits<float>::kMostSquares, "more than a lane has room for");
// Places of a whole run that are read in turn. A processor fetches ahead in each page for itself,
// so a loop that only reads, and at one place, waits for most of what it reads. An update reads
// several tensors.
constexpr int64_t kPlaces = 4;
// How far ahead memory is asked for: by a run into the second cache, and from there into the first.
// The last run of a chunk asks for nothing: what follows is another thread's.
constexpr int kNearPrefetchBytes = 512;

// Makes `bin` the highest own bin of some grads, of which one is above it. Returns false if some
// are not finite; these are then counted, and the others need not be.
template <class T, class Storage>
bool raise_bin(const Storage* grads, int64_t n, int& bin, NormSums& sums) {
  Magnitudes<T> found;
  for (int64_t i = 0; i < n; ++i) found.add(load<T>(grads[i]));
  sums.infinite += found.infinite;
  sums.nan += found.nan;
  if (found.are_finite()) bin = own_bin<T>(found.largest);
  return found.are_finite();
}

// Adds up to kRun squares, whole blocks. `bin` is the highest own bin so far; `ahead` is how many
// bytes further the next run is.
template <class T, class Storage>
__attribute__((noinline)) void add_run(const Storage* grads, int64_t n, int64_t ahead, int& bin,
                                       NormSums& sums) {
  using V = Register<T>;
  using Words = decltype(as_bits(V()));
  constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));
  constexpr int64_t kBytes = kBlock<T> * sizeof(Storage), kPairBytes = 2 * kLanes * sizeof(Storage);
  constexpr int64_t kApart = kRun / kPlaces * sizeof(Storage);
  static_assert(kApart % kBytes == 0, "places are divided into blocks");
  constexpr bool kExact = kHasExactSquares<Storage> && kHasFma;
  for (;;) {
    const V scale = norm_scale<T>(bin);
    Words seen = Word<T>{0}, slices[kSlices<T>];
    for (Words& slice : slices) slice = Word<T>{0};
    const auto add_block = [&](const char* from) __attribute__((always_inline)) {
      for (int64_t byte = 0; byte < kBytes; byte += kCacheLine) {
        __builtin_prefetch(from + byte + ahead, 0, 2);
        __builtin_prefetch(from + byte + kNearPrefetchBytes);
      }
      V values[kCount];
      for_each_pair(values, [&](auto p, auto& two) __attribute__((always_inline)) {
        load_in_any_order<Storage>(from + p * kPairBytes, two);
      });
      for (int j = 0; j < kCount; ++j) add_square<T, kExact>(values[j] * scale, slices, seen);
    };
    const char* from = reinterpret_cast<const char*>(grads);
    const char* const end = from + n * sizeof(Storage);
    if (n == kRun) {
      for (const char* const second = from + kApart; from < second; from += kBytes) {
#pragma GCC unroll 1
        for (int64_t place = 0; place < kPlaces; ++place) add_block(from + place * kApart);
      }
      from = end;
    }
    for (; from < end; from += kBytes) add_block(from);
    Word<T> lanes[kLanes];
    write(lanes, seen.raw);
    bool fits = true;
    for (const Word<T> lane : lanes) fits = fits && lane <= kMostSeen<T, kExact>;
    if (!fits && raise_bin<T>(grads, n, bin, sums)) continue;
    for (int k = 0; fits && k < kSlices<T>; ++k) {
      write(lanes, slices[k].raw);
      for (const Word<T> lane : lanes)
        bins_of<T>(sums)[bin - k] += slice_sum<T>(lane, n / kLanes, k);
    }
    return;
  }
}

// Adds consecutive squares. Zeros fill the last block up.
template <class T, class Storage>
void add_squares(const Storage* grads, int64_t n, int& bin, NormSums& sums) {
  const int64_t whole = n / kBlock<T> * kBlock<T>;
  for (int64_t at = 0, run; at < whole; at += run) {
    run = whole - at < kRun ? whole - at : kRun;
    const bool is_last = whole - at < 2 * kRun;
    add_run<T>(grads + at, run, is_last ? 0 : kRun * sizeof(Storage), bin, sums);
  }
  if (whole == n) return;
  Storage rest[kBlock<T>];
  __builtin_memset(rest, 0, sizeof(rest));
  __builtin_memcpy(rest, grads + whole, static_cast<size_t>(n - whole) * sizeof(Storage));
  add_run<T>(rest, kBlock<T>, 0, bin, sums);
}

// Adds the squares of elements [begin, end) of an update's grad. Strided ones are gathered.
template <class Storage>
void add_squares(const ParamUpdate& update, const Layout* layouts, int64_t begin, int64_t end,
                 int& bin, NormSums& sums) {
  using T = typename Compute<Storage>::Type;
  const Storage* const grads = static_cast<const Storage*>(update.data[kGrad]);
  if (update.layout == kDense) return add_squares<T>(grads + begin, end - begin, bin, sums);
  constexpr int64_t kTile = 2048;
  Storage tile[kTile];
  Cursor cursor(layouts[update.layout], begin);
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    for_each_run(cursor, n, [&](int64_t offset, int64_t run, const Cursor& from) {
      const Storage* const source = grads + from.at(kGrad);
      for (int64_t i = 0; i < run; ++i) tile[offset + i] = source[i * from.stride(kGrad)];
    });
    add_squares<T>(tile, n, bin, sums);
  }
}

// The grads of a chunk, each added to the sums of its norm class.
void sum_chunk_here(const Step& step, int64_t chunk, HighestBins& highest, NormSums* classes) {
  for (Parts parts(step, chunk); !parts.done(); parts.next()) {
    const ParamUpdate& update = parts.update();
    const DType dtype = update.formats.dtypes[kGrad];
    const bool is_double = dtype == DType::kFloat64;
    const FlushMode mode(!is_double);
    with_storage<double>(dtype, [&](auto format) {
      add_squares<decltype(format)>(update, step.layouts, parts.begin(), parts.end(),
                                    is_double ? highest.in_double : highest.in_float,
                                    classes[update.norm_class]);
    });
  }
}

}  // namespace
}  // namespace fusedopt::cpu
