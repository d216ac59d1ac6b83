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

// Below this a step is done before a second thread has woken up, and where other programs keep the
// cores busy, waiting for that thread can cost a scheduler's time slice: milliseconds.
constexpr int64_t kMinParallelChunks = 24;
constexpr int64_t kMinChunksPerThread = 4;

ChunkRunner chunk_runner(Isa isa) {
#if defined(FUSEDOPT_X86_64)
  if (isa == Isa::kAvx512) return run_chunk_avx512;
  if (isa == Isa::kAvx2) return run_chunk_avx2;
#endif
  return isa == Isa::kBaseline ? run_chunk_baseline : nullptr;
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

// One parallel region for the whole step; threads take chunks as they come free, so a thread that
// the system takes away for a while holds up nobody.
void run(const Step& step, Isa isa, int num_threads, const std::function<void()>& first) {
  const ChunkRunner run_chunk = chunk_runner(isa);
  std::atomic<int64_t> next{0};
  const auto work_off = [&] {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < step.num_chunks;)
      run_chunk(step, chunk);
  };
#if defined(_OPENMP)
  const auto wanted = std::min<int64_t>(num_threads, step.num_chunks / kMinChunksPerThread);
  if (step.num_chunks >= kMinParallelChunks && wanted > 1) {
    // Workers compute under the caller's floating-point modes (torch.set_flush_denormal sets them
    // for one thread only): which thread takes a chunk must not show in the result.
    std::fenv_t callers;
    std::fegetenv(&callers);
#pragma omp parallel num_threads(static_cast<int>(wanted))
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

}  // namespace fusedopt::cpu
