#pragma once

#include "core/average.h"
#include "core/dtypes.h"
#include "core/layout.h"
#include "core/weight.h"

// The innermost loop of a step. Part of isa_kernels.h, which says what must not be used here.
namespace fusedopt::cpu {
namespace {

// Storage of operands that lie consecutively: of param and grad, of the states, what makes a weight
// of the param, and whether there is an average, in the type that computes.
template <class P, class S, Master kWith = Master::kNone, bool kWithAverage = false>
struct Formats {
  using Param = P;
  using State = S;
  using T = typename Compute<P>::Type;
  static constexpr Master kMaster = kWith;
  static constexpr bool kAverage = kWithAverage;
  static_assert(!kAverage || sizeof(P) == sizeof(T), "the average is of what the param reads");
};

// Runs shorter than this are left to the processor's own prefetching.
constexpr int64_t kPrefetchElements = 8192;
constexpr int64_t kPrefetchAhead = 256;
constexpr int64_t kStride = 128;  // elements between two rounds of asking ahead
constexpr int64_t kCacheLine = 64;

// Asks for kStride elements. The processor's own prefetching starts anew on every page, and a step
// walks through four or five pages at once.
template <class Storage>
void prefetch(const Storage* from) {
  for (int64_t at = 0; at < kStride; at += kCacheLine / static_cast<int64_t>(sizeof(Storage)))
    __builtin_prefetch(from + at);
}

template <class F>
void prefetch_all(void* const* operands, int num_states, int64_t at) {
  prefetch(static_cast<const typename F::Param*>(operands[kParam]) + at);
  prefetch(static_cast<const typename F::Param*>(operands[kGrad]) + at);
  for (int s = 0; s < num_states; ++s)
    prefetch(static_cast<const typename F::State*>(operands[kFirstState + s]) + at);
  const void* const master = operands[kFirstState + num_states];
  if (F::kMaster == Master::kFloat32) prefetch(static_cast<const float*>(master) + at);
  if (F::kMaster == Master::kSplit) prefetch(static_cast<const int16_t*>(master) + at);
  if (F::kAverage) {
    constexpr int kBefore = kFirstState + (F::kMaster == Master::kNone ? 0 : 1);
    prefetch(static_cast<const typename F::T*>(operands[kBefore + num_states]) + at);
  }
}

// The weight of element `at`, and back. `master` is what the formats say, or nothing.
template <class F>
FUSEDOPT_HD typename F::T load_weight(const typename F::Param* param, const void* master,
                                      int64_t at) {
  if constexpr (F::kMaster == Master::kFloat32)
    return static_cast<const float*>(master)[at];
  else if constexpr (F::kMaster == Master::kSplit)
    return join_weight({param[at].bits, static_cast<const int16_t*>(master)[at]});
  else
    return load<typename F::T>(param[at]);
}

template <class F>
FUSEDOPT_HD void store_weight(typename F::Param* param, void* master, int64_t at,
                              typename F::T weight) {
  if constexpr (F::kMaster == Master::kSplit) {
    const SplitWeight parts = split_weight(weight);
    param[at].bits = parts.param;
    static_cast<int16_t*>(master)[at] = parts.remainder;
  } else {
    if constexpr (F::kMaster == Master::kFloat32) static_cast<float*>(master)[at] = weight;
    store(param[at], weight);
  }
}

// Elements [0, n) of a param, its grad, as many states as the rule has, the master and the average,
// if any.
template <class F, class Rule>
void update(const Rule rule, const Average<typename F::T> average, void* const* operands,
            int64_t n) {
  using T = typename F::T;
  using State = typename F::State;
  constexpr int kStates = Rule::kNumStates;
  const auto param = static_cast<typename F::Param*>(operands[kParam]);
  const auto grad = static_cast<const typename F::Param*>(operands[kGrad]);
  State* const state0 = static_cast<State*>(operands[kFirstState]);
  State* const state1 = static_cast<State*>(operands[kFirstState + 1]);
  State* const state2 = static_cast<State*>(operands[kFirstState + 2]);
  void* const master = operands[kFirstState + kStates];
  T* const ema = static_cast<T*>(operands[kFirstState + kStates + (F::kMaster != Master::kNone)]);
  const int64_t stride = n >= kPrefetchElements ? kStride : n;
  for (int64_t begin = 0; begin < n; begin += stride) {
    const int64_t end = n - begin < stride ? n : begin + stride;
    if (end + kPrefetchAhead <= n) prefetch_all<F>(operands, kStates, begin + kPrefetchAhead);
    // An iteration touches no element but its own, which is what the pragma promises.
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      T p = load_weight<F>(param, master, i);
      T s0 = kStates > 0 ? load<T>(state0[i]) : T();
      T s1 = kStates > 1 ? load<T>(state1[i]) : T();
      T s2 = kStates > 2 ? load<T>(state2[i]) : T();
      rule(p, load<T>(grad[i]), s0, s1, s2);
      if constexpr (kStates > 0) store(state0[i], s0);
      if constexpr (kStates > 1) store(state1[i], s1);
      if constexpr (kStates > 2) store(state2[i], s2);
      store_weight<F>(param, master, i, p);
      if constexpr (F::kAverage) ema[i] = average(ema[i], p);
    }
  }
}

}  // namespace
}  // namespace fusedopt::cpu
