// The CUDA driver as the bindings see it. The build chooses what stands behind it: the driver
// itself, its emulation on the host for tests, or a stand-in that says that there is none.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/step.h"

namespace fusedopt::cuda {

// A number that only the device knows: a tensor of one element there. `data` is nullptr if the host
// knows the number.
struct DeviceScalar {
  const void* data;
  DType dtype;
  uint8_t unused[7] = {};  // in place of padding: changes are found by comparing all bytes
};

// The hyper-parameters of a param group. Those that are tensors on the device are read there, and
// their entries in `values` are not used.
struct HyperParamsRef {
  HyperParams values;
  DeviceScalar lr, weight_decay, momentum, dampening, beta1, beta2, eps;
};

// Where the device finds a parameter's count of steps.
struct StepCounter {
  void* step;  // number of steps so far, a tensor of one element; nullptr: none is needed
  int32_t group;
  DType dtype;    // of `step`
  bool active;    // it has a grad in this step
  bool is_first;  // its state is new
  bool is_fresh;  // its state was created here, not loaded: it is still new if the count is 0
};

// What one device does in a step. Pointers into host memory are borrowed for the call, those into
// device memory until the step is done there.
struct DeviceStep {
  int gpu;                     // CUDA's number of the device
  void* stream;                // a cudaStream_t
  const ParamUpdate* updates;  // of the whole optimizer; those of other devices are left alone
  int64_t num_updates;
  const Layout* layouts;
  int64_t num_layouts;
  // Either the scalars, as in Step, or, with `counters`, what the device computes them from.
  const Scalars* scalars;
  int64_t num_scalars;
  const StepCounter* counters;  // one for each update, or nullptr
  const HyperParamsRef* groups;
  int64_t num_groups;
  // In device memory, or nullptr.
  const float* grad_scale;     // the grads are still multiplied by this
  const float* found_inf;      // above 0: the step changes nothing
  double host_grad_scale = 1;  // as the host knows it, where grad_scale is nullptr
  // If the grads are read before the step, where their sums and their GradStatus go on the device.
  bool reads_grads;
  bool clips;           // as in finalize_norm() of core/norm.h
  GradStatus* status;   // nullptr if the grads are not read
  NormSums* norm_sums;  // of each norm class; finalize_norm() reads the first
  int64_t num_classes;  // number of norm classes of the updates
};

// What the driver may ask torch's allocators for.
enum class Memory {
  kDevice,      // in the order of the device's current stream
  kPageLocked,  // on the host, for copies that the host does not wait for
  kZeros,       // as kDevice, filled with zeros
};
using Allocate = std::function<std::shared_ptr<void>(int gpu, int64_t bytes, Memory kind)>;

// Keeps what a device needs from one step to the next, and launches the kernels.
class Driver {
 public:
  virtual ~Driver() = default;

  // Does all that can fail without writing to a parameter or state. Raises std::runtime_error.
  virtual void prepare(const DeviceStep& device_step) = 0;

  // Enqueues the reading of the grads of the step that was prepared, and, when the sums of all
  // devices have been brought together in `norm_sums`, the writing of the GradStatus.
  virtual void sum_squares(const DeviceStep& device_step) = 0;
  virtual void finalize_norm(const DeviceStep& device_step) = 0;

  // Enqueues the step that was prepared, without waiting for the device. Calls no function of
  // Python or torch. Raises if CUDA refuses.
  virtual void launch(const DeviceStep& device_step) = 0;
};

// Why CUDA tensors cannot be stepped by this build, or nullptr if they can.
const char* unavailable_reason();

std::unique_ptr<Driver> make_driver(Allocate allocate);  // not to be called if unavailable

// True if the stream is being captured into a CUDA graph.
bool is_capturing(int gpu, void* stream);

// Compute capabilities that the build has code for, such as "80;90"; empty without CUDA.
std::string architectures();

// In builds with the emulation: whether it is switched on. Tensors on the CPU then take the place
// of CUDA tensors.
bool is_emulated();

}  // namespace fusedopt::cuda
