// The CPU driver: chooses the instruction set, and gives threads their chunks of a step.

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

int64_t threads_for(const Step& step, int num_threads) {
  const auto wanted = std::min<int64_t>(num_threads, step.num_chunks / kMinChunksPerThread);
  return step.num_chunks >= kMinParallelChunks ? std::max<int64_t>(wanted, 1) : 1;
}

// A thread takes one chunk after the other until none is left, so that one that the system stops
// for a while does not hold up the others.
template <class F>
void take_chunks(const Step& step, std::atomic<int64_t>& next, const F& run_chunk) {
  for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < step.num_chunks;)
    run_chunk(chunk);
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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
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

// One parallel region for the whole step.
void run(const Step& step, Isa isa, int num_threads, const std::function<void()>& first) {
  const Kernels& kernels = kernels_of(isa);
  std::atomic<int64_t> next{0};
  run_in_threads(threads_for(step, num_threads), first, [&] {
    take_chunks(step, next, [&](int64_t chunk) { kernels.run_chunk(step, chunk); });
  });
}

void sum_squares(const Step& step, Isa isa, int num_threads, NormSums* sums, int64_t num_classes) {
  const Kernels& kernels = kernels_of(isa);
  const int64_t wanted = threads_for(step, num_threads);
  std::vector<NormSums> parts(static_cast<size_t>(wanted * num_classes));
  std::atomic<int64_t> next{0}, next_part{0};
  run_in_threads(
      wanted, [] {},
      [&] {
        NormSums* const own = parts.data() + num_classes * next_part.fetch_add(1);
        HighestBins highest;
        take_chunks(step, next,
                    [&](int64_t chunk) { kernels.sum_chunk(step, chunk, highest, own); });
      });
  std::fill(sums, sums + num_classes, NormSums());
  for (size_t i = 0; i < parts.size(); ++i) sums[i % static_cast<size_t>(num_classes)] += parts[i];
}

}  // namespace fusedopt::cpu
