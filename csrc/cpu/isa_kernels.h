#pragma once

#include "core/flush.h"
#include "core/step.h"
#include "cpu/isa.h"
#include "cpu/measure.h"
#include "cpu/update.h"

// The loops of the CPU driver. Included by one source file per instruction set and compiled with
// its flags. Everything here has internal linkage and uses no library templates: the linker must
// not be able to share a copy built for one instruction set with code for another.
namespace fusedopt::cpu {
namespace {

void run_work(const Step& step, const Work& work, int64_t begin, int64_t end) {
  with_rule(work.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if (!work.formats.in_double()) return update<Rule, float>(step, work, begin, end);
    const FlushMode mode(false);
    update<Rule, double>(step, work, begin, end);
  });
}

void run_chunk_here(const Step& step, int64_t chunk) {
  const ChunkStart from = step.chunks[chunk], to = step.chunks[chunk + 1];
  const FlushMode mode(true);
  for (int64_t w = from.work; w <= to.work; ++w) {
    const int64_t begin = w == from.work ? from.element : 0;
    if (w == to.work && begin >= to.element) break;  // the end may lie behind the last work
    const Work& work = step.works[w];
    const int64_t end = w == to.work ? to.element : work.numel;
    if (work.device != kCpu || begin >= end) continue;
    run_work(step, work, begin, end);
  }
}

constexpr Kernels kKernels = {run_chunk_here, measure_leaf, count_nonfinite};

}  // namespace
}  // namespace fusedopt::cpu
