#pragma once

#include "core/dtypes.h"
#include "core/step.h"
#include "cpu/isa.h"
#include "cpu/measure.h"
#include "cpu/tiles.h"
#include "cpu/update.h"

// The loops of the CPU driver. Included by one source file per instruction set and compiled with
// its flags. Everything here has internal linkage and uses no library templates: the linker must
// not be able to share a copy built for one instruction set with code for another.
namespace fusedopt::cpu {
namespace {

template <class Family, class T, int kVariant>
typename Family::template Rule<T, kVariant> make_rule(const Scalars& scalars) {
  return {scalars_of(Family{}, scalars).rule.template as<T>()};
}

// Operands that lie consecutively in these formats: straight from and to memory.
template <class Family, class F, int kVariant>
void run_dense(const Step& step, const Work& work, int64_t begin, int64_t end) {
  void* operands[kMaxOperands + 2] = {};  // two more: update() looks for a master and an average
  for (int k = 0; k < work.num_operands; ++k)
    operands[k] = static_cast<char*>(work.data[k]) + begin * item_size(work.dtypes[k]);
  const Scalars& scalars = step.scalars[work.scalars];
  const auto rule = make_rule<Family, typename F::T, kVariant>(scalars);
  const auto average = scalars_of(Family{}, scalars).common.average.template as<typename F::T>();
  update<F>(rule, average, operands, end - begin);
}

// As run_dense, any other way.
template <class Family, class T, int kVariant>
void run_general(const Step& step, const Work& work, int64_t begin, int64_t end) {
  const Scalars& scalars = step.scalars[work.scalars];
  const auto common = scalars_of(Family{}, scalars).common.template as<T>();
  const auto apply = [](const Scalars& all, void* const* values, int64_t n) {
    update<Formats<T, T>>(make_rule<Family, T, kVariant>(all), Average<T>(), values, n);
  };
  constexpr int kNumStates = Family::template Rule<T, kVariant>::kNumStates;
  run_tiles<T>({step, work, scalars, common, kNumStates, apply}, begin, end);
}

using Runner = void (*)(const Step&, const Work&, int64_t, int64_t);

// The formats that have a loop of their own: those of most models. All else goes through tiles.
enum Path {
  kAllFloat32,
  kAllFloat64,
  kAllBFloat16,
  kAllFloat16,
  kFloat32WithAverage,
  kFloat32WithBFloat16States,
  kBFloat16WithFloat32States,
  kMaster,
  kSplitWithBFloat16States,
  kSplitWithFloat32States,
  kTilesInFloat,
  kTilesInDouble,
  kNumPaths
};

// All states in one format, as far as there are any.
bool has_states_in(const Work& work, DType dtype) {
  const int end = work.num_operands - (work.master == Master::kNone ? 0 : 1) - work.has_ema;
  bool all = true;
  for (int k = kFirstState; k < end; ++k) all = all && work.dtypes[k] == dtype;
  return all;
}

int path_of(const Work& work) {
  const int column = column_of(work);
  if (column < kNumDTypes) return kAllFloat32 + column;
  const int tiles = column == kMixedDouble ? kTilesInDouble : kTilesInFloat;
  const DType param = work.dtypes[kParam];
  if (work.layout != kDense || work.stochastic_rounding || work.dtypes[kGrad] != param)
    return tiles;
  const bool float32 = has_states_in(work, DType::kFloat32);
  if (work.has_ema)
    return param == DType::kFloat32 && float32 && work.dtypes[ema_operand(work)] == DType::kFloat32
               ? kFloat32WithAverage
               : tiles;
  const bool bfloat16 = has_states_in(work, DType::kBFloat16);
  const bool is_narrow = param == DType::kBFloat16;
  if (work.master == Master::kSplit)
    return float32 ? kSplitWithFloat32States : bfloat16 ? kSplitWithBFloat16States : tiles;
  if (work.master == Master::kFloat32) return is_narrow && float32 ? kMaster : tiles;
  if (is_narrow && float32) return kBFloat16WithFloat32States;
  return param == DType::kFloat32 && bfloat16 ? kFloat32WithBFloat16States : tiles;
}

template <class Family, int kVariant = 0>
Runner find_runner(int variant, int path) {
  if constexpr (kVariant < Family::kNumVariants) {
    if (variant != kVariant) return find_runner<Family, kVariant + 1>(variant, path);
    constexpr Master kSplit = Master::kSplit;
    constexpr Runner kRunners[kNumPaths] = {
        run_dense<Family, Formats<float, float>, kVariant>,
        run_dense<Family, Formats<double, double>, kVariant>,
        run_dense<Family, Formats<BFloat16, BFloat16>, kVariant>,
        run_dense<Family, Formats<Float16, Float16>, kVariant>,
        run_dense<Family, Formats<float, float, Master::kNone, true>, kVariant>,
        run_dense<Family, Formats<float, BFloat16>, kVariant>,
        run_dense<Family, Formats<BFloat16, float>, kVariant>,
        run_dense<Family, Formats<BFloat16, float, Master::kFloat32>, kVariant>,
        run_dense<Family, Formats<BFloat16, BFloat16, kSplit>, kVariant>,
        run_dense<Family, Formats<BFloat16, float, kSplit>, kVariant>,
        run_general<Family, float, kVariant>,
        run_general<Family, double, kVariant>};
    return kRunners[path];
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
      return find_runner<decltype(family)>(work.variant, path_of(work));
    });
    run(step, work, begin, end);
  }
}

constexpr Kernels kKernels = {run_chunk_here, measure_leaf, count_nonfinite};

}  // namespace
}  // namespace fusedopt::cpu
