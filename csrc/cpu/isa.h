// The functions that each instruction set has. They are called through pointers: the one that the
// processor can run is chosen at run time.
#pragma once

#include "core/step.h"

namespace fusedopt::cpu {

struct Kernels {
  // Runs chunk number `chunk` of a step.
  void (*run_chunk)(const Step& step, int64_t chunk);
  // Adds the squares of the chunk's grads to the sums of their norm classes. `highest` are the bins
  // of squares that the thread has met.
  void (*sum_chunk)(const Step& step, int64_t chunk, HighestBins& highest, NormSums* classes);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace fusedopt::cpu
