// What the bindings hand to a driver: one step of a whole optimizer, checked and ready to run; and
// the CPU driver's interface (that of the CUDA driver is core/gpu.h).
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/chunks.h"
#include "core/element.h"
#include "core/layout.h"
#include "core/norm.h"
#include "core/step_scalars.h"

namespace fusedopt {

// All that a driver needs to know of one parameter's update. A complex tensor counts as twice as
// many real elements. Kernels load it in accesses of 16 bytes, hence its size.
struct alignas(32) ParamUpdate {
  void* data[kMaxOperands];  // by operand (core/layout.h); nullptr for those that are absent
  int64_t numel;
  int64_t first_element;  // its number in the tensor that this is a part of; 0: this is all of it
  int32_t scalars;        // index into Step::scalars
  int32_t layout;         // index into Step::layouts, or kDense
  Formats formats;
  RuleId rule;
  uint8_t variant;     // of the rule, its number
  uint8_t device;      // kIdle, kCpu or the number of a GPU above kFirstGpu
  uint8_t norm_class;  // grads of one class are summed together (fusedopt/_norms.py)
  uint8_t unused[4];
  float* scales[kMaxStates];  // of states that are codes, one for each group (core/codes.h)
};
inline constexpr int32_t kDense = -1;
inline constexpr uint8_t kIdle = 0;  // there is no grad in this step, so nothing is done
inline constexpr uint8_t kCpu = 1;
inline constexpr uint8_t kFirstGpu = 2;
inline constexpr int kMaxGpus = 255 - kFirstGpu;
static_assert(sizeof(ParamUpdate) == 128, "whole cache lines, and whole vectors of a GPU");

// A step on the CPU. All pointers are borrowed for the call; `chunks` has num_chunks + 1 entries.
struct Step {
  const ParamUpdate* updates;
  const Scalars* scalars;
  const Layout* layouts;
  const ChunkStart* chunks;
  int64_t num_chunks;
  // Whether the order of the updates counts, since a grad is memory that another update writes:
  // then each is done before the next one is begun, and there must be one thread.
  bool in_order;
};

namespace cpu {

// Instruction sets that the driver chooses from, in rising order.
enum class Isa : uint8_t { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
Isa best_isa();        // the highest one that this build has and this processor can run
int openmp_version();  // date of the OpenMP standard that is built in; 0: none

// Runs a step with at most `num_threads` threads, and returns when all of it is done. The calling
// thread runs `first` before its part, while the others are at work already; it must not throw.
// Updates of other devices are left alone.
void run(const Step& step, Isa isa, int num_threads, const std::function<void()>& first = [] {});

// Sums the squares of the grads of a step's updates (core/norm.h), one sum for each of so many norm
// classes.
void sum_squares(const Step& step, Isa isa, int num_threads, NormSums* sums, int64_t num_classes);

}  // namespace cpu
}  // namespace fusedopt
