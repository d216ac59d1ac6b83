#pragma once

#include "core/dtypes.h"
#include "core/step.h"
#include "core/stochastic.h"
#include "core/weight.h"
#include "cpu/cursor.h"
#include "cpu/update.h"

// Steps of works whose operands differ in format, are strided, or are more than param, grad and
// states: tile by tile through the first-level cache, in the type that computes. Part of
// isa_kernels.h, which says what must not be used here.
namespace fusedopt::cpu {
namespace {

// Six values of an element in double take 12 KiB.
constexpr int64_t kTileElements = 256;

// What is computed with of an element: the weight in the place of the param, the grad, the states
// as a rule has them, then the average.
constexpr int kWeight = kParam;
constexpr int kEmaValue = kFirstState + kMaxStates;
constexpr int kNumValues = kEmaValue + 1;

template <class T>
inline constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

template <class T>
void gather(T* to, const void* from, DType dtype, int64_t at, int64_t stride, int64_t n) {
  with_storage(dtype, [=](auto format) {
    using Storage = decltype(format);
    const Storage* const source = static_cast<const Storage*>(from) + at;
    if (stride == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = load<T>(source[i]);
    else
      for (int64_t i = 0; i < n; ++i) to[i] = load<T>(source[i * stride]);
  });
}

template <class T>
void scatter(void* to, const T* from, DType dtype, int64_t at, int64_t stride, int64_t n) {
  with_storage(dtype, [=](auto format) {
    using Storage = decltype(format);
    Storage* const target = static_cast<Storage*>(to) + at;
    if (stride == 1)
      for (int64_t i = 0; i < n; ++i) store(target[i], from[i]);
    else
      for (int64_t i = 0; i < n; ++i) store(target[i * stride], from[i]);
  });
}

// Rounds to a 16-bit format, to nearest, without leaving T.
template <class T>
void round_in_place(T* values, DType dtype, int64_t n) {
  with_storage(dtype, [=](auto format) {
    for (int64_t i = 0; i < n; ++i) {
      decltype(format) stored;
      store(stored, values[i]);
      values[i] = load<T>(stored);
    }
  });
}

template <class T>
void round_in_place_stochastically(T* values, const uint32_t* draws, int operand, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    values[i] = T(round_stochastically(static_cast<float>(values[i]), draws[i], operand));
}

template <class T>
struct TiledWork {
  const Step& step;
  const Work& work;
  const Scalars& scalars;
  CommonScalars<T> common;
  int num_states;
  void (*apply)(const Scalars& scalars, void* const* values, int64_t n);
};

template <class T>
class Tiles {
 public:
  Tiles(const TiledWork<T>& tiled, int64_t begin)
      : tiled_(tiled),
        work_(tiled.work),
        layout_(work_.layout == kDense ? consecutive_ : tiled.step.layouts[work_.layout]),
        source_(layout_, begin),
        target_(layout_, begin) {
    for (int value = 0; value < kNumValues; ++value) {
      const bool is_average = value == kEmaValue;
      used_[value] = is_average ? work_.has_ema : value < kFirstState + tiled.num_states;
      operands_[value] = is_average ? ema_operand(work_)
                         : value == kWeight && work_.master == Master::kFloat32
                             ? master_operand(work_)
                             : value;
      const bool is_split = value == kWeight && work_.master == Master::kSplit;
      in_place_[value] = used_[value] && !is_split && work_.layout == kDense &&
                         work_.dtypes[operands_[value]] == kDTypeOf<T>;
    }
  }

  // Elements [at, at + n), which follow those of the call before.
  void run(int64_t n) {
    for_each_run(source_, n, [&](int64_t offset, int64_t run, const Cursor& cursor) {
      for (int value = 0; value < kNumValues; ++value)
        if (used_[value]) load_run(value, offset, run, cursor);
      if (work_.stochastic_rounding) draw(offset, run, cursor);
    });
    tiled_.apply(tiled_.scalars, values_, n);
    for (int value = kFirstState; value < kEmaValue; ++value)
      if (used_[value]) round(value, work_.dtypes[value], n);
    if (work_.master == Master::kNone) round(kWeight, work_.dtypes[kParam], n);
    if (work_.has_ema) average(n);
    for_each_run(target_, n, [&](int64_t offset, int64_t run, const Cursor& cursor) {
      for (int value = 0; value < kNumValues; ++value)
        if (used_[value] && value != kGrad) store_run(value, offset, run, cursor);
    });
  }

  // Asks for elements [at, at + n) of a dense work, which are yet to come.
  void prefetch_from(int64_t at, int64_t n) const {
    for (int k = 0; k < work_.num_operands; ++k) {
      const int64_t item = item_size(work_.dtypes[k]);
      const char* const from = static_cast<const char*>(work_.data[k]) + at * item;
      for (int64_t byte = 0; byte < n * item; byte += kCacheLine) __builtin_prefetch(from + byte);
    }
  }

 private:
  T* values(int value) const { return static_cast<T*>(values_[value]); }

  void load_run(int value, int64_t offset, int64_t n, const Cursor& cursor) {
    const int k = operands_[value];
    if (in_place_[value]) {  // a dense tile is one run
      values_[value] = static_cast<T*>(work_.data[k]) + cursor.at(k);
      return;
    }
    T* const to = tile_[value] + offset;
    values_[value] = tile_[value];
    if (value != kWeight || work_.master != Master::kSplit)
      return gather(to, work_.data[k], work_.dtypes[k], cursor.at(k), cursor.stride(k), n);
    const int m = master_operand(work_);
    const uint16_t* const param = static_cast<uint16_t*>(work_.data[kParam]) + cursor.at(kParam);
    const int16_t* const rest = static_cast<int16_t*>(work_.data[m]) + cursor.at(m);
    const int64_t stride = cursor.stride(kParam), rest_stride = cursor.stride(m);
    if (stride == 1 && rest_stride == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = T(join_weight({param[i], rest[i]}));
    else
      for (int64_t i = 0; i < n; ++i)
        to[i] = T(join_weight({param[i * stride], rest[i * rest_stride]}));
  }

  void store_run(int value, int64_t offset, int64_t n, const Cursor& cursor) const {
    const T* const from = values(value) + offset;
    if (value == kWeight && work_.master == Master::kSplit) return split_run(from, n, cursor);
    if (value == kWeight && work_.master == Master::kFloat32)
      scatter(work_.data[kParam], from, work_.dtypes[kParam], cursor.at(kParam),
              cursor.stride(kParam), n);
    const int k = operands_[value];
    if (!in_place_[value])
      scatter(work_.data[k], from, work_.dtypes[k], cursor.at(k), cursor.stride(k), n);
  }

  void split_run(const T* from, int64_t n, const Cursor& cursor) const {
    const int m = master_operand(work_);
    uint16_t* const param = static_cast<uint16_t*>(work_.data[kParam]) + cursor.at(kParam);
    int16_t* const rest = static_cast<int16_t*>(work_.data[m]) + cursor.at(m);
    const int64_t stride = cursor.stride(kParam), rest_stride = cursor.stride(m);
    if (stride == 1 && rest_stride == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const SplitWeight parts = split_weight(static_cast<float>(from[i]));
        param[i] = parts.param;
        rest[i] = parts.remainder;
      }
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const SplitWeight parts = split_weight(static_cast<float>(from[i]));
      param[i * stride] = parts.param;
      rest[i * rest_stride] = parts.remainder;
    }
  }

  void draw(int64_t offset, int64_t n, const Cursor& cursor) {
    const auto first = static_cast<uint64_t>(cursor.at(kIndex));
    const auto stride = static_cast<uint64_t>(cursor.stride(kIndex));
    const auto count = static_cast<uint64_t>(n);
    const uint32_t rounding_key = tiled_.common.rounding_key;
    uint32_t* const draws = draws_ + offset;
    if ((first + count * stride) >> 32 == first >> 32) {  // 32 bits suffice
      const uint32_t key = draw_key(rounding_key, first), step = static_cast<uint32_t>(stride);
      for (uint32_t i = 0; i < static_cast<uint32_t>(n); ++i)
        draws[i] = element_draw(key, static_cast<uint32_t>(first) + i * step);
      return;
    }
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t element = first + i * stride;
      draws[i] = element_draw(draw_key(rounding_key, element), static_cast<uint32_t>(element));
    }
  }

  // What is stored in 16 bits is rounded first where that is not to the nearest, or where the
  // average is of what the param will be.
  void round(int value, DType dtype, int64_t n) {
    if (work_.stochastic_rounding && dtype == DType::kBFloat16)
      round_in_place_stochastically(values(value), draws_, value, n);
    else if (value == kWeight && work_.has_ema && item_size(dtype) == 2)
      round_in_place(values(value), dtype, n);
  }

  void average(int64_t n) {
    const Average<T> average = tiled_.common.average;
    T* const ema = values(kEmaValue);
    const T* const weight = values(kWeight);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) ema[i] = average(ema[i], weight[i]);
  }

  const TiledWork<T>& tiled_;
  const Work& work_;
  const Dim line_ = {work_.numel, {1, 1, 1, 1, 1, 1, 1, 1}};
  const Layout consecutive_ = {&line_, 1};
  const Layout& layout_;
  Cursor source_, target_;
  bool used_[kNumValues], in_place_[kNumValues];
  int operands_[kNumValues];
  void* values_[kNumValues] = {};  // of T
  T tile_[kNumValues][kTileElements];
  uint32_t draws_[kTileElements];
};

constexpr int64_t kTilesAhead = 2;

template <class T>
void run_tiles(const TiledWork<T>& tiled, int64_t begin, int64_t end) {
  Tiles<T> tiles(tiled, begin);
  const bool asks_ahead = tiled.work.layout == kDense && end - begin >= kPrefetchElements;
  for (int64_t at = begin; at < end; at += kTileElements) {
    const int64_t ahead = at + kTilesAhead * kTileElements;
    if (asks_ahead && ahead + kTileElements <= end) tiles.prefetch_from(ahead, kTileElements);
    tiles.run(end - at < kTileElements ? end - at : kTileElements);
  }
}

}  // namespace
}  // namespace fusedopt::cpu
