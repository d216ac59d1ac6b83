// All that the driver asks of CUDA. runtime.cu does it with the CUDA runtime, emulated.cpp does the
// same on the host; the build chooses one of them. Failures raise std::runtime_error with the name
// of the call, the device and CUDA's message.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda/launch.h"

namespace fusedopt::cuda::runtime {

// While it lives, this device is the current one of this thread. The one before is put back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int gpu);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* before_;  // the context that was current
};

// Raises unless the current device can run the kernels. Loads all of them: CUDA would otherwise
// load a kernel at its first launch, which could be during a capture.
void check_kernels(int gpu);

// Copies from page-locked memory, in the order of the stream, without waiting. The source must stay
// as it is until the copy is done.
void copy_to_device(void* to, const void* from, int64_t bytes, void* stream);

// Fills device memory with zeros, in the order of the stream.
void clear(void* data, int64_t bytes, void* stream);

// Allocates device memory for the table of a captured graph, from CUDA itself: memory that torch
// allocates during a capture is shared by graphs, which write to it when they are replayed. The
// graph may be replayed as long as the memory is held.
std::shared_ptr<void> allocate_persistent(int64_t bytes);

// Copies at once and waits, even while a stream is being captured. The target must be memory that
// nothing has used yet, as no stream is waited for.
void copy_to_device_now(void* to, const void* from, int64_t bytes);

// A CUDA event: a point in a stream, which is done when all work before it is. It is recorded again
// and again, by one stream at a time. One that was never recorded is done.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(void* stream);
  bool is_done() const;
  void wait() const;

 private:
  void* event_;
};

// The kernels, enqueued on the stream that is given.
void update(const UpdateCall& call);
void sum_squares(const SumSquaresCall& call);
void finalize_norm(const FinalizeArguments& arguments, void* stream);
void step_scalars(RuleId rule, const StepScalarsArguments& arguments, void* stream);

}  // namespace fusedopt::cuda::runtime
