// The loops of the CPU driver, included by one source file for each instruction set and compiled
// with its flags. Everything here has internal linkage and uses no library templates: the linker
// must not replace a copy built for one instruction set by one that was built for another.
#pragma once

#include "core/flush.h"
#include "core/step.h"
#include "cpu/isa.h"
#include "cpu/grad_norm.h"
#include "cpu/update.h"

namespace fusedopt::cpu {
namespace {

// Elements [begin, end) of an update. Computation in double keeps subnormal numbers.
void run_update(const Step& step, const ParamUpdate& update, int64_t begin, int64_t end) {
  with_rule(update.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if (!update.formats.in_double()) return update_elements<Rule, float>(step, update, begin, end);
    const FlushMode mode(false);
    update_elements<Rule, double>(step, update, begin, end);
  });
}

// All updates of a chunk; computation in float flushes subnormal numbers.
void run_chunk_here(const Step& step, int64_t chunk) {
  const ChunkStart from = step.chunks[chunk], to = step.chunks[chunk + 1];
  const FlushMode mode(true);
  for (int64_t w = from.update; w <= to.update; ++w) {
    const int64_t begin = w == from.update ? from.element : 0;
    if (w == to.update && begin >= to.element) break;  // the end may be behind the last update
    const ParamUpdate& update = step.updates[w];
    const int64_t end = w == to.update ? to.element : update.numel;
    if (update.device != kCpu || begin >= end) continue;
    run_update(step, update, begin, end);
  }
}

constexpr Kernels kKernels = {run_chunk_here, sum_leaf, count_nonfinite};

}  // namespace
}  // namespace fusedopt::cpu
