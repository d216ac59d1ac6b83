#pragma once

#include <cstdint>
#include <memory>

#include "cuda/launch.h"

// What the driver asks of CUDA, and all of it: the emulation does the same on the host. Failures
// raise std::runtime_error with the name of the call, the device and CUDA's words.
namespace fusedopt::cuda::runtime {

// Makes a device the current one of this thread for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int gpu);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* before_;  // the context
};

// Raises unless the current device can run the kernels. Loads them, so that a capture does not.
void check_kernels(int gpu);

// From page-locked memory, in the order of the stream, without waiting.
void copy_to_device(void* to, const void* from, int64_t bytes, void* stream);

// Device memory for captured graphs, which may run as long as it lives. From CUDA itself: what
// torch allocates during a capture is shared by graphs and written to when they run.
std::shared_ptr<void> allocate_persistent(int64_t bytes);

// At once and from any memory, into memory that nothing has used yet, whatever is being captured.
void copy_to_device_now(void* to, const void* from, int64_t bytes);

// A point in a stream. Points are used again and again, by one stream at a time.
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

void update(const UpdateCall& call);
void sum_squares(const SumSquaresCall& call);
void total(const TotalArguments& arguments, const FinalizeArguments& finalizing, void* stream);
void finalize_norm(const FinalizeArguments& arguments, void* stream);
void step_scalars(RuleId rule, const StepScalarsArguments& arguments, void* stream);

}  // namespace fusedopt::cuda::runtime
