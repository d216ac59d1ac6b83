// Whether a thread of the host flushes subnormal numbers to zero. Computation in float does on all
// drivers: subnormal numbers take a CPU ten times as long, and GPUs can be made to do the same.
// Computation in double keeps them.
#pragma once

#include <cstdint>

#include "core/macros.h"

#if defined(__SSE2__) && !defined(__CUDA_ARCH__)
#include <xmmintrin.h>
#endif

namespace fusedopt {

// While it lives, this thread flushes subnormal inputs and results to zero, or keeps them, whatever
// its caller has set (torch.set_flush_denormal, for example). So results do not depend on the
// caller.
class FlushMode {
 public:
  explicit FlushMode(bool flushes) : before_(read()) {
    write(flushes ? before_ | kFlush : before_ & ~kFlush);
  }
  ~FlushMode() { write(before_); }
  FlushMode(const FlushMode&) = delete;
  FlushMode& operator=(const FlushMode&) = delete;

 private:
#if defined(__SSE2__) && !defined(__CUDA_ARCH__)
  using Mode = uint32_t;
  static constexpr Mode kFlush = 0x8040;  // of MXCSR: results (FTZ), inputs (DAZ)
  static __attribute__((always_inline)) Mode read() { return _mm_getcsr(); }
  static __attribute__((always_inline)) void write(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__) && !defined(__CUDA_ARCH__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = Mode{1} << 24;  // of FPCR: FZ, for both
  static __attribute__((always_inline)) Mode read() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static __attribute__((always_inline)) void write(Mode mode) {
    asm volatile("msr fpcr, %0" ::"r"(mode));
  }
#else
  using Mode = uint32_t;
  static constexpr Mode kFlush = 0;
  static Mode read() { return 0; }
  static void write(Mode) {}
#endif

  Mode before_;
};

}  // namespace fusedopt
