#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/chunks.h"
#include "core/element.h"
#include "core/layout.h"
#include "core/norm.h"
#include "core/step_scalars.h"

// What the bindings hand to a driver: one step of a whole optimizer, checked and ready to run.
namespace fusedopt {

// One parameter's share of a step. A complex tensor counts as twice as many real elements.
struct alignas(32) ParamUpdate {
  void* data[kMaxOperands];  // as in core/layout.h; nullptr where `formats` has none
  int64_t numel;
  int32_t scalars;  // index into Step::scalars
  int32_t layout;   // index into Step::layouts, or kDense
  Formats formats;
  RuleId rule;
  uint8_t variant;     // of the rule
  uint8_t device;      // kIdle, kCpu or the number of a GPU above kFirstGpu
  uint8_t norm_class;  // grads of one class have a sum of their own in the global norm
  uint8_t unused[12];
};
inline constexpr int32_t kDense = -1;
inline constexpr uint8_t kIdle = 0;  // no grad this time, nothing to do
inline constexpr uint8_t kCpu = 1;
inline constexpr uint8_t kFirstGpu = 2;
inline constexpr int kMaxGpus = 255 - kFirstGpu;
static_assert(sizeof(ParamUpdate) == 96, "whole halves of cache lines, and whole vectors of a GPU");

// Every pointer is borrowed for the call. `chunks` has `num_chunks + 1` entries.
struct Step {
  const ParamUpdate* updates;
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
// thread starts with `first`, which must not throw, while the others are at work already. Works of
// other devices are left alone.
void run(const Step& step, Isa isa, int num_threads, const std::function<void()>& first = [] {});

// Sums the squares of the grads, a result for each leaf (core/norm.h), in the order of the leaves.
// Works of other devices count nothing.
std::vector<PartialSum> sum_squares(const ParamUpdate* updates, const Layout* layouts,
                                    const std::vector<ChunkStart>& leaves, Isa isa,
                                    int num_threads);

}  // namespace cpu
}  // namespace fusedopt
