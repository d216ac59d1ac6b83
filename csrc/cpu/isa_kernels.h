// The loops of the CPU driver, included by one source file for each instruction set and compiled
// with its flags. Everything here has internal linkage and uses no library templates: the linker
// must not replace a copy built for one instruction set by one that was built for another.
#pragma once

#include "core/flush.h"
#include "core/step.h"
#include "cpu/grad_norm.h"
#include "cpu/isa.h"
#include "cpu/update.h"

namespace fusedopt::cpu {
namespace {

// All updates of a chunk. Computation in float flushes subnormal numbers, in double it keeps them.
void run_chunk_here(const Step& step, int64_t chunk) {
  const FlushMode mode(true);
  for (Parts parts(step, chunk); !parts.done();)
    with_rule(parts.update().rule, [&](auto rule) {
      using Rule = decltype(rule);
      if (!parts.update().formats.in_double()) {
        parts = update_alike<Rule, float>(step, parts);
      } else {
        const FlushMode keeping(false);
        parts = update_alike<Rule, double>(step, parts);
      }
    });
}

constexpr Kernels kKernels = {run_chunk_here, sum_chunk_here};

}  // namespace
}  // namespace fusedopt::cpu
