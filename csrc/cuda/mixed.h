#pragma once

#include <cstdint>
#include <cstring>

#include "core/rules.h"
#include "core/step.h"
#include "core/stochastic.h"
#include "core/weight.h"
#include "cuda/formats.h"
#include "cuda/lane.h"

// Updates of works whose operands differ in format, lie anywhere, or are more than param, grad and
// states. What is there, and in which format, is found out at run time, the same for all threads of
// a warp; so one text of loads and stores serves all variants of a rule.
namespace fusedopt::cuda {

// In the place of a format where there is none for all operands; computed in T.
template <class Computed>
struct Mixed {
  using T = Computed;
  static constexpr bool kIsMixed = true;
  // Blocks for an SM, a bound on registers: without it, nvcc spills for some GPUs.
  static constexpr int kMinBlocks = sizeof(T) == sizeof(float) ? 4 : 2;
};

template <class Family, class T>
class MixedWork {
  // An element in registers: the weight in the place of the param, grad, as many states as a rule
  // of the family may have, what holds the rest of the weight (that value is unused), the average.
  static constexpr int kMaster = kFirstState + Family::kMaxStates;
  static constexpr int kAverage = kMaster + 1;
  static constexpr int kAll = kAverage + 1;
  static_assert(kAll <= kMaxOperands, "no more than a work has");
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
  using Unpacked = Values<T, kVector>;
  using Scalars = StepScalars<Family, T>;

 public:
  // Of a work and where it was loaded from: registers have no numbers that are known at run time
  // only, so what may be at one place or another is loaded again.
  FUSEDOPT_HD MixedWork(const Work& work, const Work* source)
      : numel_(work.numel),
        layout_(work.layout),
        variant_(work.variant),
        master_(work.master),
        stochastic_rounding_(work.stochastic_rounding) {
    const bool has_master = master_ != Master::kNone;
    const int num_own = work.num_operands - (work.has_ema ? 1 : 0) - (has_master ? 1 : 0);
    for (int k = 0; k < kMaster; ++k)
      if (k < num_own) set(k, k, work.data[k], work);
    if (has_master) set(kMaster, num_own, load_item(source->data + num_own), work);
    if (!work.has_ema) return;
    const int last = work.num_operands - 1;
    set(kAverage, last, load_item(source->data + last), work);
  }

  // Elements [begin, end).
  FUSEDOPT_HD void update(const Scalars& scalars, const Layout* layouts, int64_t begin, int64_t end,
                          Lane lane) {
    const bool is_dense = layout_ == kDense;
    int64_t done = begin;
    if (is_dense && is_vectorizable(begin)) {
      const int64_t vectors = (end - begin) / kVector;
      for (int64_t i = lane.index; i < vectors; i += lane.count)
        update_vector(scalars, begin + i * kVector);
      done += vectors * kVector;
    }
    for (int64_t at = done + lane.index; at < end; at += lane.count)
      update_one(scalars, is_dense ? everywhere(at) : find(layouts[layout_], at));
  }

 private:
  // Where an element is in every operand, and its number in its tensor.
  struct Places {
    int64_t at[kAll];
    int64_t index;
  };

  FUSEDOPT_HD void set(int operand, int k, void* data, const Work& work) {
    static_assert(sizeof(work.dtypes) < sizeof(uint64_t), "all dtypes in one register");
    uint64_t dtypes = 0;
    for (int i = 0; i < kMaxOperands; ++i)
      dtypes |= static_cast<uint64_t>(work.dtypes[i]) << (8 * i);
    data_[operand] = static_cast<char*>(data);
    dtypes_[operand] = static_cast<DType>((dtypes >> (8 * k)) & 0xff);
    sources_[operand] = static_cast<uint8_t>(k);
  }

  FUSEDOPT_HD bool has(int operand) const { return data_[operand] != nullptr; }

  FUSEDOPT_HD char* address(int operand, int64_t at) const {
    return data_[operand] + at * item_size(dtypes_[operand]);
  }

  // All but the grad, which is often a view into a bucket of many: the cache makes up for its small
  // loads.
  FUSEDOPT_HD bool is_vectorizable(int64_t at) const {
    bool all = true;
    for (int k = 0; k < kAll; ++k) all = all && (k == kGrad || !has(k) || is_whole(k, at));
    return all;
  }

  FUSEDOPT_HD bool is_whole(int operand, int64_t at) const {
    return is_aligned(address(operand, at), kVector * item_size(dtypes_[operand]));
  }

  FUSEDOPT_HD void update_vector(const Scalars& scalars, int64_t at) const {
    Vector vectors[kAll];
    for (int k = 0; k < kAll; ++k)
      if (k != kGrad) vectors[k] = load_vector(k, at);
    vectors[kGrad] = is_whole(kGrad, at) ? load_vector(kGrad, at) : gather_vector(kGrad, at);
    T elements[kVector][kAll] = {};
    unpack_weights(vectors, elements);
    for (int k = kGrad; k < kAll; ++k)
      if (k != kMaster && has(k)) unpack(k, vectors[k], elements);
    apply<kVector>(scalars, elements);
    for (int j = 0; j < kVector; ++j) finish(scalars.common, at + j, elements[j]);
    store_weights(elements, at);
    for (int k = kFirstState; k < kAll; ++k)
      if (k != kMaster && has(k)) store_vector(k, elements, at);
  }

  FUSEDOPT_HD void update_one(const Scalars& scalars, const Places& places) const {
    T elements[1][kAll] = {};
    T(&element)[kAll] = elements[0];
    element[kParam] = load_weight(places);
    for (int k = kGrad; k < kAll; ++k)
      if (k != kMaster && has(k)) element[k] = load_one(k, places.at[k]);
    apply<1>(scalars, elements);
    finish(scalars.common, places.index, element);
    store_weight(places, element[kParam]);
    for (int k = kFirstState; k < kAll; ++k)
      if (k != kMaster && has(k)) store_one(k, places.at[k], element[k]);
  }

  // The rule's variant is looked up for all elements at once.
  template <int kCount, int kVariant = 0>
  FUSEDOPT_HD void apply(const Scalars& scalars, T (&elements)[kCount][kAll]) const {
    if constexpr (kVariant < Family::kNumVariants) {
      if (variant_ != kVariant) return apply<kCount, kVariant + 1>(scalars, elements);
      const typename Family::template Rule<T, kVariant> rule = {scalars.rule};
      T unused[kMaxOperands];
      for (int j = 0; j < kCount; ++j) cuda::apply(rule, elements[j], unused);
    }
  }

  // What is done with an element between the rule and its stores.
  FUSEDOPT_HD void finish(const CommonScalars<T>& common, int64_t index, T (&element)[kAll]) const {
    if (stochastic_rounding_) {
      const auto number = static_cast<uint64_t>(index);
      const uint32_t draw =
          element_draw(draw_key(common.rounding_key, number), static_cast<uint32_t>(number));
      for (int k = 0; k < kMaster; ++k)
        if (k != kGrad && has(k) && dtypes_[k] == DType::kBFloat16)
          element[k] =
              static_cast<T>(round_stochastically(static_cast<float>(element[k]), draw, k));
    }
    if (!has(kAverage)) return;
    if (master_ == Master::kNone) element[kParam] = as_stored(element[kParam], dtypes_[kParam]);
    element[kAverage] = common.average(element[kAverage], element[kParam]);
  }

  static FUSEDOPT_HD T as_stored(T value, DType dtype) {
    if (dtype == DType::kBFloat16) return through<BFloat16>(value);
    return dtype == DType::kFloat16 ? through<Float16>(value) : value;
  }

  template <class Storage>
  static FUSEDOPT_HD T through(T value) {
    Storage stored;
    store(stored, value);
    return load<T>(stored);
  }

  // Branches on the number of bytes alone, so that no thread waits for one operand before it has
  // asked for the next.
  FUSEDOPT_HD Vector load_vector(int operand, int64_t at) const {
    const int64_t bytes = has(operand) ? item_size(dtypes_[operand]) * kVector : 0;
    const char* const from = address(operand, at);
    Vector vector = {};
    if (bytes == 16) load_part<4>(from, vector);
    if (bytes == 8) load_part<2>(from, vector);
    if (bytes == 4) load_part<1>(from, vector);
    return vector;
  }

  FUSEDOPT_HD void store_bytes(int operand, int64_t at, const Vector& vector) const {
    const int64_t bytes = item_size(dtypes_[operand]) * kVector;
    char* const to = address(operand, at);
    if (bytes == 16) store_part<4>(vector, to);
    if (bytes == 8) store_part<2>(vector, to);
    if (bytes == 4) store_part<1>(vector, to);
  }

  FUSEDOPT_HD Vector gather_vector(int operand, int64_t at) const {
    Vector vector = {};
    with_storage_of(operand, [&](auto format) {
      using Storage = decltype(format);
      Values<Storage, kVector> stored;
      for (int j = 0; j < kVector; ++j)
        stored.values[j] = load_item(reinterpret_cast<const Storage*>(address(operand, at)) + j);
      memcpy(&vector, &stored, sizeof(stored));
    });
    return vector;
  }

  FUSEDOPT_HD void unpack(int operand, const Vector& vector, T (&elements)[kVector][kAll]) const {
    unpack_as(operand, operand, vector, elements);
  }

  FUSEDOPT_HD void unpack_as(int value, int operand, const Vector& vector,
                             T (&elements)[kVector][kAll]) const {
    with_storage_of(operand, [&](auto format) {
      Values<decltype(format), kVector> stored;
      memcpy(&stored, &vector, sizeof(stored));
      for (int j = 0; j < kVector; ++j) elements[j][value] = load<T>(stored.values[j]);
    });
  }

  FUSEDOPT_HD void unpack_weights(const Vector (&vectors)[kAll],
                                  T (&elements)[kVector][kAll]) const {
    if (master_ == Master::kNone) return unpack(kParam, vectors[kParam], elements);
    if (master_ == Master::kFloat32) return unpack_as(kParam, kMaster, vectors[kMaster], elements);
    Values<uint16_t, kVector> params;
    Values<int16_t, kVector> rest;
    memcpy(&params, &vectors[kParam], sizeof(params));
    memcpy(&rest, &vectors[kMaster], sizeof(rest));
    for (int j = 0; j < kVector; ++j)
      elements[j][kParam] = static_cast<T>(join_weight({params.values[j], rest.values[j]}));
  }

  FUSEDOPT_HD void store_vector(int operand, const T (&elements)[kVector][kAll], int64_t at) const {
    store_vector_as(operand, operand, elements, at);
  }

  FUSEDOPT_HD void store_vector_as(int operand, int value, const T (&elements)[kVector][kAll],
                                   int64_t at) const {
    Vector vector = {};
    with_storage_of(operand, [&](auto format) {
      Values<decltype(format), kVector> stored;
      for (int j = 0; j < kVector; ++j) store(stored.values[j], elements[j][value]);
      memcpy(&vector, &stored, sizeof(stored));
    });
    store_bytes(operand, at, vector);
  }

  FUSEDOPT_HD void store_weights(const T (&elements)[kVector][kAll], int64_t at) const {
    if (master_ != Master::kSplit) {
      store_vector(kParam, elements, at);
      if (master_ == Master::kFloat32) store_vector_as(kMaster, kParam, elements, at);
      return;
    }
    Values<uint16_t, kVector> params;
    Values<int16_t, kVector> rest;
    for (int j = 0; j < kVector; ++j) {
      const SplitWeight parts = split_weight(static_cast<float>(elements[j][kParam]));
      params.values[j] = parts.param;
      rest.values[j] = parts.remainder;
    }
    Vector vector = {};
    memcpy(&vector, &params, sizeof(params));
    store_bytes(kParam, at, vector);
    memcpy(&vector, &rest, sizeof(rest));
    store_bytes(kMaster, at, vector);
  }

  FUSEDOPT_HD T load_one(int operand, int64_t at) const {
    T value = 0;
    with_storage_of(operand, [&](auto format) {
      value = load<T>(load_item(reinterpret_cast<const decltype(format)*>(address(operand, at))));
    });
    return value;
  }

  FUSEDOPT_HD T load_weight(const Places& places) const {
    const int64_t at = places.at[kParam], at_rest = places.at[kMaster];
    if (master_ == Master::kNone) return load_one(kParam, at);
    if (master_ == Master::kFloat32) return load_one(kMaster, at_rest);
    const uint16_t param = load_item(reinterpret_cast<const uint16_t*>(address(kParam, at)));
    const int16_t rest = load_item(reinterpret_cast<const int16_t*>(address(kMaster, at_rest)));
    return static_cast<T>(join_weight({param, rest}));
  }

  FUSEDOPT_HD void store_one(int operand, int64_t at, T value) const {
    with_storage_of(operand, [&](auto format) {
      decltype(format) stored;
      store(stored, value);
      store_item(reinterpret_cast<decltype(format)*>(address(operand, at)), stored);
    });
  }

  FUSEDOPT_HD void store_weight(const Places& places, T value) const {
    const int64_t at = places.at[kParam], at_rest = places.at[kMaster];
    if (master_ != Master::kSplit) {
      store_one(kParam, at, value);
      if (master_ == Master::kFloat32) store_one(kMaster, at_rest, value);
      return;
    }
    const SplitWeight parts = split_weight(static_cast<float>(value));
    store_item(reinterpret_cast<uint16_t*>(address(kParam, at)), parts.param);
    store_item(reinterpret_cast<int16_t*>(address(kMaster, at_rest)), parts.remainder);
  }

  // Of an element of a dense work.
  FUSEDOPT_HD Places everywhere(int64_t at) const {
    Places places;
    for (int64_t& place : places.at) place = at;
    places.index = at;
    return places;
  }

  FUSEDOPT_HD Places find(const Layout& layout, int64_t element) const {
    Places places = {};
    int64_t left = element;
    for (int d = layout.num_dims - 1; d >= 0; --d) {
      const Dim* const dim = layout.dims + d;
      const int64_t size = load_item(&dim->size);
      const int64_t outer = divide(left, size, numel_ <= INT32_MAX);
      const int64_t index = left - outer * size;
#pragma unroll
      for (int k = 0; k < kAll; ++k)
        if (has(k)) places.at[k] += index * load_item(dim->strides + sources_[k]);
      places.index += index * load_item(dim->strides + kIndex);
      left = outer;
    }
    return places;
  }

  template <int kWords>
  static FUSEDOPT_HD void load_part(const char* from, Vector& vector) {
    const Words<kWords> part = load_words<kWords>(from);
    for (int j = 0; j < kWords; ++j) vector.words[j] = part.words[j];
  }

  template <int kWords>
  static FUSEDOPT_HD void store_part(const Vector& vector, char* to) {
    Words<kWords> part;
    for (int j = 0; j < kWords; ++j) part.words[j] = vector.words[j];
    store_words(to, part);
  }

  // float64 does not take part where float is computed with, nor does code for it.
  template <class F>
  FUSEDOPT_HD void with_storage_of(int operand, const F& f) const {
    const DType dtype = dtypes_[operand];
    if (dtype == DType::kFloat32) return f(float{});
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    if (dtype == DType::kFloat16) return f(Float16{});
    if constexpr (sizeof(T) == sizeof(double)) f(double{});
  }

  char* data_[kAll] = {};
  DType dtypes_[kAll] = {};
  uint8_t sources_[kAll] = {};  // their numbers in the work
  int64_t numel_;
  int32_t layout_;
  uint8_t variant_;
  Master master_;
  bool stochastic_rounding_;
};

}  // namespace fusedopt::cuda
