#include "cuda/runtime.h"

#include <stdexcept>
#include <string>

#include "cuda/update.cuh"

namespace fusedopt::cuda {

// Compiled elsewhere, a file for each format.
extern template const void* update_kernel_of<Uniform<float>>(RuleId rule);
extern template const void* update_kernel_of<Uniform<double>>(RuleId rule);
extern template const void* update_kernel_of<Uniform<BFloat16>>(RuleId rule);
extern template const void* update_kernel_of<Uniform<Float16>>(RuleId rule);
extern template const void* update_kernel_of<Mixed<float>>(RuleId rule);
extern template const void* update_kernel_of<Mixed<double>>(RuleId rule);

namespace {

constexpr int kScheduleThreads = 128;

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  int gpu = -1;
  cudaGetDevice(&gpu);
  cudaGetLastError();  // it is reported here and now
  std::string message = std::string(call) + " failed on cuda:" + std::to_string(gpu) + ": " +
                        cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorInsufficientDriver)
    message += "; this build of fusedopt uses CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
               std::to_string(CUDART_VERSION % 1000 / 10) +
               ": update the driver, or build fusedopt with an older nvcc";
  else
    message += "; an earlier kernel of the program may have caused it";
  throw std::runtime_error(message);
}

const void* kernel_of(RuleId rule, int column) {
  switch (column) {
    case static_cast<int>(DType::kFloat32):
      return update_kernel_of<Uniform<float>>(rule);
    case static_cast<int>(DType::kFloat64):
      return update_kernel_of<Uniform<double>>(rule);
    case static_cast<int>(DType::kBFloat16):
      return update_kernel_of<Uniform<BFloat16>>(rule);
    case static_cast<int>(DType::kFloat16):
      return update_kernel_of<Uniform<Float16>>(rule);
    case kMixedFloat:
      return update_kernel_of<Mixed<float>>(rule);
    default:
      return update_kernel_of<Mixed<double>>(rule);
  }
}

// While it lives, calls of this thread that a capture forbids are allowed; none of them goes into
// the stream that is captured.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <class Family>
__global__ void __launch_bounds__(kScheduleThreads)
    schedule_kernel(const __grid_constant__ ScheduleArguments arguments) {
  schedule_thread<Family>(arguments, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

}  // namespace

const char* unavailable_reason() { return nullptr; }

std::string architectures() { return FUSEDOPT_CUDA_ARCHS; }

bool is_emulated() { return false; }

const Emulation* emulation() { return nullptr; }

bool is_capturing(int gpu, void* stream) {
  const runtime::OnGpu on_gpu(gpu);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

namespace runtime {

OnGpu::OnGpu(int gpu) : before_(gpu) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != gpu) check(cudaSetDevice(gpu), "cudaSetDevice");
  const int current = before_;
  before_ = current == gpu ? -1 : current;
}

OnGpu::~OnGpu() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void check_kernels(int gpu, RuleId rule, int column) {
  const Relaxed relaxed;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_of(rule, column));
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction)
    return check(error, "cudaFuncGetAttributes");
  cudaGetLastError();
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, gpu);
  const std::string found = std::to_string(major * 10 + minor);
  throw std::runtime_error("this build of fusedopt has no code for cuda:" + std::to_string(gpu) +
                           " (compute capability " + found + "); it was built for " +
                           architectures() + ". Rebuild it with FUSEDOPT_CUDA_ARCHS=" + found);
}

void copy_to_device(void* to, const void* from, int64_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream)),
        "cudaMemcpyAsync");
}

void copy_to_device_now(void* to, const void* from, int64_t bytes) {
  const Relaxed relaxed;
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const cudaError_t copied =
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream);
  const cudaError_t done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(copied, "cudaMemcpyAsync");
  check(done, "cudaStreamSynchronize");
}

Point::Point() : event_(nullptr) {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  event_ = event;
}

Point::~Point() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }

void Point::record(void* stream) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(stream)),
        "cudaEventRecord");
}

bool Point::is_passed() const {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (status != cudaErrorNotReady) check(status, "cudaEventQuery");
  return status == cudaSuccess;
}

void Point::wait() const { cudaEventSynchronize(static_cast<cudaEvent_t>(event_)); }

void update(const UpdateCall& call) {
  with_family(call.rule, [&](auto family) {
    using Family = decltype(family);
    const auto launch = [&](const auto& arguments) {
      void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))};
      check(cudaLaunchKernel(kernel_of(call.rule, call.column),
                             dim3(static_cast<unsigned>(call.num_chunks)), dim3(kBlockThreads),
                             pointers, 0, static_cast<cudaStream_t>(call.stream)),
            "cudaLaunchKernel");
    };
    if (in_double(call.column))
      launch(arguments_for<Family, double>(call));
    else
      launch(arguments_for<Family, float>(call));
  });
}

void schedule(RuleId rule, const ScheduleArguments& arguments, void* stream) {
  with_family(rule, [&](auto family) {
    const auto blocks = (arguments.num_rows + kScheduleThreads - 1) / kScheduleThreads;
    schedule_kernel<decltype(family)><<<dim3(static_cast<unsigned>(blocks)), kScheduleThreads, 0,
                                        static_cast<cudaStream_t>(stream)>>>(arguments);
    check(cudaGetLastError(), "cudaLaunchKernel");
  });
}

}  // namespace runtime
}  // namespace fusedopt::cuda
