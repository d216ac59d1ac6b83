// The CPU driver: chooses the instruction set, and gives threads their chunks of a step and their
// leaves of the norm.

#include <algorithm>
#include <atomic>
#include <cfenv>

#include "core/step.h"
#include "cpu/isa.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusedopt::cpu {
namespace {

// A step of fewer chunks is done by one thread. It takes no longer than a second thread takes to
// wake up. And where other programs keep the cores busy, to wait for that thread can cost a time
// slice of the scheduler, which is milliseconds.
constexpr int64_t kMinParallelChunks = 24;
constexpr int64_t kMinChunksPerThread = 4;
// The same for the reading of grads.
constexpr int64_t kMinParallelElements = kMinParallelChunks * kMinChunkElements;
constexpr int64_t kLeavesAtATime = 8;

const Kernels& kernels_of([[maybe_unused]] Isa isa) {
#if defined(FUSEDOPT_X86_64)
  if (isa == Isa::kAvx512) return kernels_avx512();
  if (isa == Isa::kAvx2) return kernels_avx2();
#endif
  return kernels_baseline();
}

// Calls `work_off` in this thread, after `first`, and in up to `num_threads - 1` others.
template <class First, class WorkOff>
void run_in_threads(int64_t num_threads, const First& first, const WorkOff& work_off) {
#if defined(_OPENMP)
  if (num_threads > 1) {
    // Worker threads compute under the floating-point modes of the caller, which may have set them
    // for its own thread only (torch.set_flush_denormal does). Otherwise the result would depend on
    // which thread takes a chunk.
    std::fenv_t callers;
    std::fegetenv(&callers);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
    {
      if (omp_get_thread_num() == 0) first();
      std::fenv_t own;
      std::fegetenv(&own);
      std::fesetenv(&callers);
      work_off();
      std::fesetenv(&own);
    }
    return;
  }
#else
  static_cast<void>(num_threads);
#endif
  first();
  work_off();
}

// The result of one leaf. Only if its sum is not finite is it read again, to count such elements.
PartialSum sum_leaf(const Kernels& kernels, const ParamUpdate& update, const Layout* layouts,
                    int64_t begin, int64_t end) {
  if (update.device != kCpu || begin >= end) return {0, 0, update.norm_class};
  double threads[kLeafThreads];
  const int used = kernels.sum_leaf(update, layouts, begin, end, threads);
  const double squares = sum_block(threads, used);
  const int64_t nonfinite =
      is_nonfinite(squares) ? kernels.count_nonfinite(update, layouts, begin, end) : 0;
  return {squares, static_cast<int32_t>(std::min<int64_t>(nonfinite, INT32_MAX)),
          update.norm_class};
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      break;
  }
  return "avx512";
}

Isa best_isa() {
#if defined(FUSEDOPT_X86_64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

int openmp_version() {
#if defined(_OPENMP)
  return _OPENMP;
#else
  return 0;
#endif
}

// One parallel region for the whole step. Threads take one chunk after the other until none is
// left, so a thread that the system stops for a while does not hold up the others.
void run(const Step& step, Isa isa, int num_threads, const std::function<void()>& first) {
  const Kernels& kernels = kernels_of(isa);
  std::atomic<int64_t> next{0};
  const auto wanted = std::min<int64_t>(num_threads, step.num_chunks / kMinChunksPerThread);
  run_in_threads(step.num_chunks >= kMinParallelChunks ? wanted : 1, first, [&] {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < step.num_chunks;)
      kernels.run_chunk(step, chunk);
  });
}

std::vector<PartialSum> sum_squares(const ParamUpdate* updates, const Layout* layouts,
                                    const std::vector<ChunkStart>& leaves, Isa isa,
                                    int num_threads) {
  const Kernels& kernels = kernels_of(isa);
  const auto count = static_cast<int64_t>(leaves.size()) - 1;
  std::vector<PartialSum> sums(static_cast<size_t>(count));
  std::atomic<int64_t> next{0};
  int64_t elements = 0;
  for (size_t i = 0; i + 1 < leaves.size(); ++i)
    if (leaves[i].element == 0) elements += updates[leaves[i].update].numel;
  run_in_threads(
      elements >= kMinParallelElements ? num_threads : 1, [] {},
      [&] {
        for (int64_t first;
             (first = next.fetch_add(kLeavesAtATime, std::memory_order_relaxed)) < count;)
          for (int64_t i = first; i < std::min(first + kLeavesAtATime, count); ++i) {
            const ChunkStart from = leaves[static_cast<size_t>(i)];
            const ChunkStart to = leaves[static_cast<size_t>(i) + 1];
            const ParamUpdate& update = updates[from.update];
            sums[static_cast<size_t>(i)] =
                sum_leaf(kernels, update, layouts, from.element,
                         to.update == from.update ? to.element : update.numel);
          }
      });
  return sums;
}

}  // namespace fusedopt::cpu
