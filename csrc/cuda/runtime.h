#pragma once

#include <cstdint>
#include <memory>

#include "cuda/launch.h"

// What the driver asks of CUDA, and all of it: the emulation does the same on the host. Failures
// raise std::runtime_error with the name of the call, the device and CUDA's words.
namespace fusedopt::cuda::runtime {

// Makes a device the current one of this thread for as long as it lives.
class OnGpu {
 public:
  explicit OnGpu(int gpu);
  ~OnGpu();
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

 private:
  void* before_;  // the context
};

// Raises unless the current device can run the kernels. Loads them, so that a capture does not.
void check_kernels(int gpu);

// From page-locked memory, in the order of the stream, without waiting.
void copy_to_device(void* to, const void* from, int64_t bytes, void* stream);

// Device memory for captured graphs, which may run as long as it lives. From CUDA itself: what
// torch allocates during a capture is shared by graphs and written to when they run.
std::shared_ptr<void> allocate_lasting(int64_t bytes);

// At once and from any memory, into memory that nothing has used yet, whatever is being captured.
void copy_to_device_now(void* to, const void* from, int64_t bytes);

// A point in a stream. Points are used again and again, by one stream at a time.
class Point {
 public:
  Point();
  ~Point();
  Point(const Point&) = delete;
  Point& operator=(const Point&) = delete;
  void record(void* stream);
  bool is_passed() const;
  void wait() const;

 private:
  void* event_;
};

void update(const UpdateCall& call);
void measure(const MeasureCall& call);
void total(const TotalArguments& arguments, const JudgeArguments& judging, void* stream);
void judge(const JudgeArguments& arguments, void* stream);
void schedule(RuleId rule, const ScheduleArguments& arguments, void* stream);

}  // namespace fusedopt::cuda::runtime
