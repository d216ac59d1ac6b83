#pragma once

#include "core/step.h"

// The entry points of the instruction sets: each runs chunk number `chunk` of a step.
namespace fusedopt::cpu {

using ChunkRunner = void (*)(const Step& step, int64_t chunk);

void run_chunk_baseline(const Step& step, int64_t chunk);
void run_chunk_avx2(const Step& step, int64_t chunk);
void run_chunk_avx512(const Step& step, int64_t chunk);

}  // namespace fusedopt::cpu
