#pragma once

#include "core/dtypes.h"
#include "core/step.h"

// The loops of the CPU driver. Included by one source file per instruction set and compiled with
// its flags. Everything here has internal linkage and uses no library templates: the linker must
// not be able to share a copy built for one instruction set with code for another.
namespace fusedopt::cpu {
namespace {

// Elements that the general path brings into the first-level cache at a time: five operands of
// double take 10 KiB.
constexpr int64_t kTileElements = 256;

template <class Family, class T, int kVariant>
typename Family::template Rule<T, kVariant> make_rule(const Scalars& scalars) {
  return {scalars_of(Family{}, scalars).template as<T>()};
}

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

// Elements [0, n) of operands that all lie consecutively in one storage format.
template <class Storage, class Rule>
void update(const Rule rule, Storage* const* operands, int64_t n) {
  using T = typename Compute<Storage>::Type;
  constexpr int kStates = Rule::kNumStates;
  Storage* const param = operands[kParam];
  const Storage* const grad = operands[kGrad];
  Storage* const state0 = operands[kFirstState];
  Storage* const state1 = operands[kFirstState + 1];
  Storage* const state2 = operands[kFirstState + 2];
  const int64_t stride = n >= kPrefetchElements ? kStride : n;
  for (int64_t begin = 0; begin < n; begin += stride) {
    const int64_t end = n - begin < stride ? n : begin + stride;
    if (end + kPrefetchAhead <= n)
      for (int k = 0; k < kFirstState + kStates; ++k)
        prefetch(operands[k] + begin + kPrefetchAhead);
    // An iteration touches no element but its own, which is what the pragma promises.
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      T p = load<T>(param[i]);
      T s0 = kStates > 0 ? load<T>(state0[i]) : T();
      T s1 = kStates > 1 ? load<T>(state1[i]) : T();
      T s2 = kStates > 2 ? load<T>(state2[i]) : T();
      rule(p, load<T>(grad[i]), s0, s1, s2);
      if constexpr (kStates > 0) store(state0[i], s0);
      if constexpr (kStates > 1) store(state1[i], s1);
      if constexpr (kStates > 2) store(state2[i], s2);
      store(param[i], p);
    }
  }
}

// Operands that all lie consecutively in one format: straight from and to memory.
template <class Family, class Storage, int kVariant>
void run_dense(const Step& step, const Work& work, int64_t begin, int64_t end) {
  using T = typename Compute<Storage>::Type;
  Storage* operands[kMaxOperands] = {};
  for (int k = 0; k < work.num_operands; ++k)
    operands[k] = static_cast<Storage*>(work.data[k]) + begin;
  const auto rule = make_rule<Family, T, kVariant>(step.scalars[work.scalars]);
  update<Storage>(rule, operands, end - begin);
}

// A position in a walk over strided operands. Between positions lie runs along the innermost dim.
class Cursor {
 public:
  Cursor(const Layout& layout, int64_t element) : layout_(layout) {
    for (int d = layout.num_dims - 1; d >= 0; --d) {
      const Dim& dim = layout.dims[d];
      index_[d] = element % dim.size;
      for (int k = 0; k < kMaxOperands; ++k) at_[k] += index_[d] * dim.strides[k];
      element /= dim.size;
    }
  }

  int64_t at(int operand) const { return at_[operand]; }
  int64_t stride(int operand) const { return inner() ? inner()->strides[operand] : 1; }
  int64_t left_in_run() const { return inner() ? inner()->size - index_[last_dim()] : 1; }

  // Goes on by n elements, at most left_in_run().
  void advance(int64_t n) {
    for (int d = last_dim(); d >= 0; --d, n = 1) {
      const Dim& dim = layout_.dims[d];
      index_[d] += n;
      for (int k = 0; k < kMaxOperands; ++k) at_[k] += n * dim.strides[k];
      if (index_[d] < dim.size) return;
      index_[d] = 0;
      for (int k = 0; k < kMaxOperands; ++k) at_[k] -= dim.size * dim.strides[k];
    }
  }

 private:
  int last_dim() const { return layout_.num_dims - 1; }
  const Dim* inner() const { return last_dim() < 0 ? nullptr : layout_.dims + last_dim(); }

  const Layout& layout_;
  int64_t index_[kMaxDims] = {};
  int64_t at_[kMaxOperands] = {};
};

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

// Calls visit(offset in tile, run length, cursor) for the runs of the next n elements.
template <class Visit>
void for_each_run(Cursor& cursor, int64_t n, const Visit& visit) {
  for (int64_t done = 0; done < n;) {
    const int64_t left = n - done;
    const int64_t run = cursor.left_in_run() < left ? cursor.left_in_run() : left;
    visit(done, run, cursor);
    cursor.advance(run);
    done += run;
  }
}

// Any formats, any strides: tile by tile through the cache, in the type that computes.
template <class Family, class T, int kVariant>
void run_general(const Step& step, const Work& work, int64_t begin, int64_t end) {
  const Dim line = {work.numel, {1, 1, 1, 1, 1}};
  const Layout consecutive = {&line, 1};
  const Layout& layout = work.layout == kDense ? consecutive : step.layouts[work.layout];
  const auto rule = make_rule<Family, T, kVariant>(step.scalars[work.scalars]);
  T tile[kMaxOperands][kTileElements];
  T* operands[kMaxOperands];
  for (int k = 0; k < kMaxOperands; ++k) operands[k] = tile[k];
  Cursor source(layout, begin), target(layout, begin);
  for (int64_t at = begin; at < end; at += kTileElements) {
    const int64_t n = end - at < kTileElements ? end - at : kTileElements;
    for_each_run(source, n, [&](int64_t offset, int64_t run, const Cursor& cursor) {
      for (int k = 0; k < work.num_operands; ++k)
        gather(tile[k] + offset, work.data[k], work.dtypes[k], cursor.at(k), cursor.stride(k), run);
    });
    update<T>(rule, operands, n);
    for_each_run(target, n, [&](int64_t offset, int64_t run, const Cursor& cursor) {
      for (int k = 0; k < work.num_operands; ++k)
        if (k != kGrad)
          scatter(work.data[k], tile[k] + offset, work.dtypes[k], cursor.at(k), cursor.stride(k),
                  run);
    });
  }
}

using Runner = void (*)(const Step&, const Work&, int64_t, int64_t);

template <class Family, int kVariant = 0>
Runner find_runner(int variant, int column) {
  if constexpr (kVariant < Family::kNumVariants) {
    if (variant != kVariant) return find_runner<Family, kVariant + 1>(variant, column);
    constexpr Runner kRunners[kNumColumns] = {
        run_dense<Family, float, kVariant>,    run_dense<Family, double, kVariant>,
        run_dense<Family, BFloat16, kVariant>, run_dense<Family, Float16, kVariant>,
        run_general<Family, float, kVariant>,  run_general<Family, double, kVariant>};
    return kRunners[column];
  }
  return nullptr;
}

void run_chunk_here(const Step& step, int64_t chunk) {
  const ChunkStart from = step.chunks[chunk], to = step.chunks[chunk + 1];
  for (int64_t w = from.work; w <= to.work; ++w) {
    const int64_t begin = w == from.work ? from.element : 0;
    if (w == to.work && begin >= to.element) break;  // the end may lie behind the last work
    const Work& work = step.works[w];
    const int64_t end = w == to.work ? to.element : work.numel;
    if (work.device != kCpu || begin >= end) continue;
    const Runner run = with_family(step.rule, [&](auto family) {
      return find_runner<decltype(family)>(work.variant, column_of(work));
    });
    run(step, work, begin, end);
  }
}

}  // namespace
}  // namespace fusedopt::cpu
