#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/step.h"

// The CUDA driver as the bindings see it. The build chooses what stands behind it: the driver
// itself, its emulation on the host for tests, or a stand-in that says that there is none.
namespace fusedopt::cuda {

// A number that only the device knows, a tensor of one element there; `data` is nullptr for others.
struct DeviceScalar {
  const void* data;
  DType dtype;
  uint8_t unused[7] = {};  // nothing uncertain: what did not change is recognised by its bytes
};

// The hyper-parameters of a param group; a number that the device knows better is read there.
struct HyperParamsRef {
  HyperParams values;
  DeviceScalar lr, weight_decay, momentum, dampening, beta1, beta2, eps;
};

// When a parameter is in its training, as the device finds it out.
struct StepCounter {
  void* step;  // steps done so far, a tensor of one element; nullptr: `is_first` says all
  int32_t group;
  DType dtype;
  bool active;
  bool is_first;  // its state is new,
  bool is_fresh;  // or it was when it was created, and is still if the count is 0
};

// One device's share of a step. Pointers into host memory are borrowed for the call.
struct DeviceStep {
  int gpu;                     // CUDA's number of the device
  void* stream;                // a cudaStream_t
  const ParamUpdate* updates;  // of the whole optimizer; the others are left alone
  int64_t num_updates;
  const Layout* layouts;
  int64_t num_layouts;
  // Either scalars, as in Step, or what the device computes them from.
  const Scalars* scalars;
  int64_t num_scalars;
  const StepCounter* counters;  // one for each work, or nullptr
  const HyperParamsRef* groups;
  int64_t num_groups;
  const float* grad_scale;  // in device memory, or nullptr, as is
  const float* found_inf;   // the step changes nothing if this is above 0
  // If the grads are read before the step, what is found out about them, in device memory.
  bool reads_grads;
  bool clips;      // as for finalize_norm()
  bool finalizes;  // what is measured here is all there is
  GradStatus*
      status;      // of sum_squares() if it judges, or of finalize_norm(); nullptr: there is none
  double* totals;  // [squares, nonfinite] of each class; what finalize_norm() reads: of all
  int64_t num_classes;  // in use by the works
};

enum class Memory {
  kDevice,      // in the order of the device's current stream
  kPageLocked,  // on the host, for copies that do not wait
  kZeros,       // as kDevice, filled with zeros
};
using Allocate = std::function<std::shared_ptr<void>(int gpu, int64_t bytes, Memory kind)>;

// What is kept on the devices between steps, and the launches.
class Driver {
 public:
  virtual ~Driver() = default;

  // Gets ready all that can fail, writing to no parameter or state. Raises std::runtime_error.
  virtual void prepare(const DeviceStep& device_step) = 0;

  // Enqueues the reading of the grads, of what was prepared, and the verdict.
  virtual void sum_squares(const DeviceStep& device_step) = 0;
  virtual void finalize_norm(const DeviceStep& device_step) = 0;

  // Enqueues what was prepared, without waiting for the device. Calls no function of Python or
  // torch. Raises if CUDA refuses.
  virtual void launch(const DeviceStep& device_step) = 0;
};

// Why CUDA tensors cannot be stepped by this build, or nullptr if they can.
const char* unavailable_reason();

std::unique_ptr<Driver> make_driver(Allocate allocate);  // not to be called if unavailable

// True if the stream is being captured into a CUDA graph.
bool is_capturing(int gpu, void* stream);

// Compute capabilities that the build has code for, "80;90"; empty without CUDA.
std::string architectures();

// In the emulation, tensors on the CPU take the place of CUDA tensors while it is switched on.
bool is_emulated();

// What tests do with the emulation; nullptr in other builds.
struct Emulation {
  void (*use)(bool emulate);  // it is switched off at first
  // Between these, kernels are recorded and not run, as when a stream is captured.
  void (*begin_capture)();
  void (*end_capture)();
  void (*replay)();  // runs what the last capture has recorded
};
const Emulation* emulation();

}  // namespace fusedopt::cuda
