#pragma once

#include <cstdint>

#include "core/rules.h"
#include "core/step.h"
#include "cuda/formats.h"
#include "cuda/lane.h"
#include "cuda/mixed.h"
#include "cuda/tuning.h"

// What one thread of the update kernel does. Threads share nothing, so the host can go through them
// one after the other and get what a GPU gives.
namespace fusedopt::cuda {

// An update's scalars as the kernel takes them, in the type that computes.
template <class Family, class T>
using ScalarsOf = StepScalars<Family, T>;

// The kernel's arguments, at most 4 KiB. All pointers are into device memory.
template <class Family, class T>
struct UpdateArguments {
  using WorkScalars = ScalarsOf<Family, T>;
  static constexpr int kFew = 3072 / static_cast<int>(sizeof(WorkScalars));

  const Work* works;
  const ChunkStart* chunks;  // one for each block, and the end
  const Layout* layouts;
  const WorkScalars* scalars;  // by Work::scalars; nullptr: they are in `few`
  const float* skip;           // nullptr or the flag that makes the step do nothing
  WorkScalars few[kFew];
};

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

template <class Rule, class Format>
FUSEDOPT_HD void update_piece(const Rule& rule, const Work& work, int64_t begin, int64_t end,
                              Lane lane) {
  const Format format(work, begin);
  const auto n = static_cast<uint32_t>(end - begin);
  bool vectorizable = true;
  for (int k = 0; k < kFirstState + Rule::kNumStates; ++k)
    vectorizable = vectorizable && (k == kGrad || format.is_vectorizable(k));
  const bool grad_is_aligned = format.is_vectorizable(kGrad);
  const uint32_t done = vectorizable ? update_vectors(rule, format, grad_is_aligned, n, lane) : 0;
  update_singles(rule, format, done, n, lane);
}

// Elements [begin, end) of a work in one format: finds the rule's variant.
template <class Family, class Format, int kVariant = 0>
FUSEDOPT_HD void update_work(const UpdateArguments<Family, typename Format::T>& arguments,
                             const Work& work, int64_t begin, int64_t end, Lane lane) {
  using T = typename Format::T;
  if constexpr (kVariant < Family::kNumVariants) {
    if (work.variant != kVariant)
      return update_work<Family, Format, kVariant + 1>(arguments, work, begin, end, lane);
    const int32_t at = work.scalars;
    const typename Family::template Rule<T, kVariant> rule = {
        arguments.scalars != nullptr ? arguments.scalars[at].rule : arguments.few[at].rule};
    update_piece<decltype(rule), Format>(rule, work, begin, end, lane);
  }
}

// All that thread number `thread` of block number `block` does.
template <class Family, class Format>
FUSEDOPT_HD void update_thread(const UpdateArguments<Family, typename Format::T>& arguments,
                               uint32_t block, uint32_t thread) {
  if (arguments.skip != nullptr && *arguments.skip > 0) return;
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
  if constexpr (Format::kIsMixed) {
    // A copy: a reference to one place or another would be of an unknown address space.
    const ScalarsOf<Family, typename Format::T> scalars = arguments.scalars != nullptr
                                                              ? arguments.scalars[work.scalars]
                                                              : arguments.few[work.scalars];
    MixedWork<Family, typename Format::T>(work, arguments.works + w)
        .update(scalars, arguments.layouts, begin, end, lane);
  } else {
    update_work<Family, Format>(arguments, work, begin, end, lane);
  }
}

}  // namespace fusedopt::cuda
