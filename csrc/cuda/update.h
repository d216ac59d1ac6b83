#pragma once

#include <cstdint>

#include "core/rules.h"
#include "core/step.h"
#include "cuda/formats.h"
#include "cuda/tuning.h"

// What one thread of the update kernel does. Threads share nothing, so the host can go through them
// one after the other and get what a GPU gives.
namespace fusedopt::cuda {

// An update's scalars as the kernel takes them, in the type that computes.
template <class Family, class T>
using ScalarsOf =
    decltype(scalars_of(Family{}, static_cast<const Scalars&>(Scalars{})).template as<T>());

// The kernel's arguments, at most 4 KiB. All pointers are into device memory.
template <class Family, class T>
struct UpdateArguments {
  using RuleScalars = ScalarsOf<Family, T>;
  static constexpr int kFew = 3072 / static_cast<int>(sizeof(RuleScalars));

  const Work* works;
  const ChunkStart* chunks;  // one for each block, and the end
  const Layout* layouts;
  const RuleScalars* scalars;  // by Work::scalars; nullptr: they are in `few`
  const float* found_inf;      // nullptr or the flag that makes the step do nothing
  RuleScalars few[kFew];
};

// A thread among those that share a piece of a work.
struct Lane {
  uint32_t index;
  uint32_t count;
};

// Values of an element; states that a rule lacks are not touched.
template <class Rule, class T, int kSize>
FUSEDOPT_HD void apply(const Rule& rule, T (&values)[kSize], T (&unused)[kMaxOperands]) {
  constexpr int kStates = Rule::kNumStates;
  rule(values[kParam], values[kGrad], kStates > 0 ? values[kFirstState % kSize] : unused[0],
       kStates > 1 ? values[(kFirstState + 1) % kSize] : unused[1],
       kStates > 2 ? values[(kFirstState + 2) % kSize] : unused[2]);
}

// The same number, of which the compiler does not know that it is: it then computes addresses
// again for the stores, where keeping those of the loads would take dozens of registers.
FUSEDOPT_HD uint32_t as_if_new(uint32_t number) {
  asm("" : "+r"(number));
  return number;
}

// Elements [0, n) as far as they fill vectors; returns how far. All operands are aligned but
// perhaps the grad, which is often a view into a bucket of many: the cache makes up for its small
// loads.
template <class Rule, class Format>
FUSEDOPT_HD uint32_t update_vectors(const Rule& rule, const Format& format, bool grad_is_aligned,
                                    uint32_t n, Lane lane) {
  using T = typename Format::T;
  constexpr int kOperands = kFirstState + Rule::kNumStates, kVector = Format::kVector;
  const uint32_t end = n - n % kVector;
  for (uint32_t at = lane.index * kVector; at < end; at += lane.count * kVector) {
    Vector vectors[kOperands];
    typename Format::Unpacked values[kOperands];
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad) vectors[k] = format.load_vector(k, at);
    vectors[kGrad] =
        grad_is_aligned ? format.load_vector(kGrad, at) : format.gather_vector(kGrad, at);
    for (int k = 0; k < kOperands; ++k) values[k] = format.unpack(k, vectors[k]);
    for (int j = 0; j < kVector; ++j) {
      T element[kOperands], unused[kMaxOperands];
      for (int k = 0; k < kOperands; ++k) element[k] = load<T>(values[k].values[j]);
      apply(rule, element, unused);
      for (int k = 0; k < kOperands; ++k)
        if (k != kGrad) store(values[k].values[j], element[k]);
    }
    const uint32_t to = as_if_new(at);
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad) format.store_vector(k, to, values[k]);
  }
  return end;
}

// Elements [begin, end) one by one, neighbours by neighbouring threads, so that accesses coalesce
// at any alignment. Several at a time, to have as much under way as with vectors.
template <class Rule, class Format>
FUSEDOPT_HD void update_singles(const Rule& rule, const Format& format, uint32_t begin,
                                uint32_t end, Lane lane) {
  using T = typename Format::T;
  constexpr int kOperands = kFirstState + Rule::kNumStates, kAtATime = 4;
  for (uint32_t at = begin + lane.index; at < end; at += lane.count * kAtATime) {
    T values[kAtATime][kOperands], unused[kMaxOperands];
    for (int j = 0; j < kAtATime; ++j)
      for (int k = 0; k < kOperands; ++k)
        values[j][k] = at + j * lane.count < end ? format.load_one(k, at + j * lane.count) : T(0);
    for (int j = 0; j < kAtATime; ++j) apply(rule, values[j], unused);
    const uint32_t to = as_if_new(at);
    for (int j = 0; j < kAtATime; ++j)
      for (int k = 0; k < kOperands; ++k)
        if (k != kGrad && to + j * lane.count < end)
          format.store_one(k, to + j * lane.count, values[j][k]);
  }
}

// Offsets of an element in every operand. `Index` is wide enough for the number of elements.
template <class Index>
FUSEDOPT_HD void find_offsets(const Layout& layout, Index element,
                              int64_t (&offsets)[kMaxOperands]) {
  for (int64_t& offset : offsets) offset = 0;
  for (int d = layout.num_dims - 1; d >= 0; --d) {
    const Dim* const dim = layout.dims + d;
    const auto size = static_cast<Index>(load_item(&dim->size));
    const Index outer = element / size;
    const auto index = static_cast<int64_t>(element - outer * size);
    for (int k = 0; k < kMaxOperands; ++k) offsets[k] += index * load_item(dim->strides + k);
    element = outer;
  }
}

// Elements [begin, end) of operands that lie anywhere.
template <class Rule, class Format, class Index>
FUSEDOPT_HD void update_strided(const Rule& rule, const Format& format, const Layout& layout,
                                Index begin, Index end, Lane lane) {
  using T = typename Format::T;
  constexpr int kOperands = kFirstState + Rule::kNumStates;
  for (Index at = begin + lane.index; at < end; at += lane.count) {
    int64_t offsets[kMaxOperands];
    find_offsets(layout, at, offsets);
    T values[kOperands], unused[kMaxOperands];
    for (int k = 0; k < kOperands; ++k) values[k] = format.load_one(k, offsets[k]);
    apply(rule, values, unused);
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad) format.store_one(k, offsets[k], values[k]);
  }
}

template <class Rule, class Format>
FUSEDOPT_HD void update_piece(const Rule& rule, const Work& work, const Layout* layouts,
                              int64_t begin, int64_t end, Lane lane) {
  if constexpr (Format::kStrided) {
    if (work.layout != kDense) {
      const Format format(work, 0);
      const Layout& layout = layouts[work.layout];
      if (work.numel <= INT32_MAX)
        return update_strided(rule, format, layout, static_cast<uint32_t>(begin),
                              static_cast<uint32_t>(end), lane);
      return update_strided(rule, format, layout, static_cast<uint64_t>(begin),
                            static_cast<uint64_t>(end), lane);
    }
  }
  const Format format(work, begin);
  const auto n = static_cast<uint32_t>(end - begin);
  bool vectorizable = true;
  for (int k = 0; k < kFirstState + Rule::kNumStates; ++k)
    vectorizable = vectorizable && (k == kGrad || format.is_vectorizable(k));
  const bool grad_is_aligned = format.is_vectorizable(kGrad);
  const uint32_t done = vectorizable ? update_vectors(rule, format, grad_is_aligned, n, lane) : 0;
  update_singles(rule, format, done, n, lane);
}

// Elements [begin, end) of a work: finds the rule's variant.
template <class Family, class Format, int kVariant = 0>
FUSEDOPT_HD void update_work(const UpdateArguments<Family, typename Format::T>& arguments,
                             const Work& work, int64_t begin, int64_t end, Lane lane) {
  using T = typename Format::T;
  if constexpr (kVariant < Family::kNumVariants) {
    if (work.variant != kVariant)
      return update_work<Family, Format, kVariant + 1>(arguments, work, begin, end, lane);
    const int32_t at = work.scalars;
    const typename Family::template Rule<T, kVariant> rule = {
        arguments.scalars != nullptr ? arguments.scalars[at] : arguments.few[at]};
    update_piece<decltype(rule), Format>(rule, work, arguments.layouts, begin, end, lane);
  }
}

// A work in four accesses, all asked for at once.
FUSEDOPT_HD Work load_work(const Work* from) {
  struct {
    Words<4> quarters[sizeof(Work) / sizeof(Words<4>)];
  } work;
  for (int i = 0; i < 4; ++i)
    work.quarters[i] = load_words<4>(reinterpret_cast<const Words<4>*>(from) + i);
  return bit_cast<Work>(work);
}

// All that thread number `thread` of block number `block` does.
template <class Family, class Format>
FUSEDOPT_HD void update_thread(const UpdateArguments<Family, typename Format::T>& arguments,
                               uint32_t block, uint32_t thread) {
  if (arguments.found_inf != nullptr && *arguments.found_inf > 0) return;
  const ChunkStart from = arguments.chunks[block], to = arguments.chunks[block + 1];
  // A part of one work for the whole block, or a work for each warp.
  const bool is_shared = to.work - from.work <= 1;
  const int64_t w = from.work + (is_shared ? 0 : thread / kWarp);
  if (!is_shared && w >= to.work) return;
  const Lane lane = is_shared ? Lane{thread, kBlockThreads} : Lane{thread % kWarp, kWarp};
  const Work work = load_work(arguments.works + w);
  if (work.device == kIdle) return;
  const int64_t begin = w == from.work ? from.element : 0;
  const int64_t end = w == to.work ? to.element : work.numel;
  update_work<Family, Format>(arguments, work, begin, end, lane);
}

}  // namespace fusedopt::cuda
