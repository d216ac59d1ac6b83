#pragma once

#include <cstdint>
#include <functional>

#include "core/chunks.h"
#include "core/dtypes.h"
#include "core/layout.h"
#include "core/rules.h"

// What the bindings hand to a driver: one step of a whole optimizer, checked and ready to run.
namespace fusedopt {

// One parameter's share of a step. A complex tensor counts as twice as many real elements.
struct Work {
  void* data[kMaxOperands];  // param, grad, states
  int64_t numel;
  int32_t scalars;  // index into Step::scalars
  int32_t layout;   // index into Step::layouts, or kDense
  DType dtypes[kMaxOperands];
  uint8_t num_operands;
  uint8_t variant;  // of the rule
  bool active;      // false: no grad this time, nothing to do
};
inline constexpr int32_t kDense = -1;
static_assert(sizeof(Work) == 64, "one cache line for each parameter");

// Every pointer is borrowed for the call. `chunks` has `num_chunks + 1` entries.
struct Step {
  RuleId rule;
  const Work* works;
  const Scalars* scalars;
  const Layout* layouts;
  const ChunkStart* chunks;
  int64_t num_chunks;
};

namespace cpu {

// Instruction sets that the driver can choose among, in rising order.
enum class Isa : uint8_t { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
Isa best_isa();        // the highest that this build and this processor share
int openmp_version();  // date of the OpenMP standard built with, 0 if without

// Runs the step with at most `num_threads` threads; returns when all of it is done. The calling
// thread starts with `first`, which must not throw, while the others are at work already.
void run(const Step& step, Isa isa, int num_threads, const std::function<void()>& first = [] {});

}  // namespace cpu

namespace cuda {

// Why CUDA tensors cannot be stepped by this build, or nullptr if they can.
const char* unavailable_reason();

}  // namespace cuda

}  // namespace fusedopt
