// Does what cuda/runtime.h says with the CUDA runtime, and holds the small kernels: step scalars
// and GradStatus. It is compiled without flushing, because these compute in double; the
// large kernels are compiled in files of their own.

#include "cuda/runtime.h"

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.cuh"

namespace fusedopt::cuda {

// Compiled in files of their own, whose flags differ.
extern template const void* update_kernel_of<float>(RuleId id);
extern template const void* update_kernel_of<double>(RuleId id);
extern template const void* codes_kernel_of<float>(RuleId id);
extern template const void* codes_kernel_of<double>(RuleId id);
extern template const void* usual_kernel_of<false>(RuleId id, int number);
extern template const void* usual_kernel_of<true>(RuleId id, int number);
extern template const void* sum_squares_kernel_of<float>();
extern template const void* sum_squares_kernel_of<double>();

namespace {

constexpr int kStepScalarsThreads = 128;
constexpr int kFinalizeThreads = 256;

// Raises if a call has failed.
void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  int gpu = -1;
  cudaGetDevice(&gpu);
  cudaGetLastError();  // clears the error: it is reported here, and not by whoever asks next
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

const void* kernel_of(RuleId rule, bool in_double, KernelKind kind) {
  if (kind >= kUsualKernel) {
    const int number = kind - kUsualKernel;
    const void* const kernel = usual_kernel_of<false>(rule, number);
    return kernel != nullptr ? kernel : usual_kernel_of<true>(rule, number);
  }
  if (kind == kCodesKernel)
    return in_double ? codes_kernel_of<double>(rule) : codes_kernel_of<float>(rule);
  return in_double ? update_kernel_of<double>(rule) : update_kernel_of<float>(rule);
}

std::vector<const void*> update_kernels_of(RuleId rule, bool in_double) {
  std::vector<const void*> kernels = {kernel_of(rule, in_double, kPlainKernel),
                                      kernel_of(rule, in_double, kCodesKernel)};
  KernelKind kind = kUsualKernel;
  while (const void* const kernel = in_double ? nullptr : kernel_of(rule, false, kind)) {
    kernels.push_back(kernel);
    ++kind;
  }
  return kernels;
}

// While a stream is captured, CUDA forbids calls such as cudaMalloc, by default to all threads, and
// would end the capture with an error. While this lives, this thread is allowed to make them. It is
// safe where none of the calls concerns the stream that is captured.
class CaptureModeGuard {
 public:
  CaptureModeGuard() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureModeGuard() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureModeGuard(const CaptureModeGuard&) = delete;
  CaptureModeGuard& operator=(const CaptureModeGuard&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The context of a thread is set by functions of the CUDA driver API; the runtime API has none.
// They are asked for by name at run time, so that the binary does not link libcuda and loads on
// machines without it.
struct Contexts {
  int (*get)(void** context);
  int (*set)(void* context);
};

template <class F>
void find_in_driver(const char* name, F& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result),
        "cudaGetDriverEntryPoint");
#endif
  if (found == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  function = reinterpret_cast<F>(found);
}

const Contexts& contexts() {
  static const Contexts found = [] {
    Contexts contexts;
    find_in_driver("cuCtxGetCurrent", contexts.get);
    find_in_driver("cuCtxSetCurrent", contexts.set);
    return contexts;
  }();
  return found;
}

// One thread for each row of a launch.
template <class Rule>
__global__ void __launch_bounds__(kStepScalarsThreads)
    step_scalars_kernel(const __grid_constant__ StepScalarsArguments arguments) {
  step_scalars_thread<Rule>(arguments, int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
}

const void* step_scalars_kernel_of(RuleId id) {
  const void* kernel = nullptr;
  with_rule(id, [&](auto rule) {
    kernel = reinterpret_cast<const void*>(&step_scalars_kernel<decltype(rule)>);
  });
  return kernel;
}

template <class T>
__device__ void find_highest(const Bins<T>& bins, int* highest) {
  for (int bin = static_cast<int>(threadIdx.x) - kTopBin<T>; bin <= kTopBin<T>;
       bin += kFinalizeThreads)
    if (bins[bin] != 0) atomicMax(highest, bin);
}

// One block, whose threads look for the highest bins.
__global__ void __launch_bounds__(kFinalizeThreads)
    finalize_kernel(const __grid_constant__ FinalizeArguments arguments) {
  __shared__ int in_float, in_double;
  if (threadIdx.x == 0) {
    in_float = -kTopBin<float>;
    in_double = -kTopBin<double>;
  }
  __syncthreads();
  find_highest(arguments.sums->in_float, &in_float);
  find_highest(arguments.sums->in_double, &in_double);
  __syncthreads();
  if (threadIdx.x == 0) finalize_thread(arguments, {in_float, in_double});
}

// cudaLaunchKernel instead of <<<>>>: kernels are passed as pointers, whatever their types.
template <class... Arguments>
void launch(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), pointers,
                         static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

}  // namespace

const char* unavailable_reason() { return nullptr; }

std::string architectures() { return FUSEDOPT_CUDA_ARCHS; }

bool is_emulated() { return false; }

bool is_capturing(int gpu, void* stream) {
  const runtime::DeviceGuard on_gpu(gpu);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

namespace runtime {

// The context that was current is put back, not the device: cudaSetDevice() would create a context
// on that device if it had none, which takes half a gigabyte of its memory.
DeviceGuard::DeviceGuard(int gpu) : before_(nullptr) {
  contexts().get(&before_);
  check(cudaSetDevice(gpu), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { contexts().set(before_); }

// For the update kernels. The first allows a block as much shared memory as a stage plan may ask
// for: by default it is 48 KiB. The second gives shared memory as much as there is of the memory
// that an SM divides between it and the L1 cache, so that as many blocks fit as possible.
constexpr std::pair<cudaFuncAttribute, int> kSharedMemory[] = {
    {cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes},
    {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared}};

// To ask for a kernel's attributes loads it, and fails if there is no code for this device.
void check_kernels(int gpu) {
  const CaptureModeGuard relaxed;
  std::vector<const void*> kernels = {sum_squares_kernel_of<float>(),
                                      sum_squares_kernel_of<double>(),
                                      reinterpret_cast<const void*>(&finalize_kernel)};
  cudaError_t error = cudaSuccess;
  for (int rule = 0; rule < Rules::kSize; ++rule) {
    const auto id = static_cast<RuleId>(rule);
    kernels.push_back(step_scalars_kernel_of(id));
    for (const bool in_double : {false, true})
      for (const void* kernel : update_kernels_of(id, in_double))
        for (const auto& [attribute, value] : kSharedMemory)
          if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute, value);
  }
  cudaFuncAttributes attributes;
  for (const void* kernel : kernels)
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction)
    return check(error, "loading the kernels");
  cudaGetLastError();  // as in check()
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

void clear(void* data, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync");
}

std::shared_ptr<void> allocate_persistent(int64_t bytes) {
  const CaptureModeGuard relaxed;
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<size_t>(bytes)), "cudaMalloc");
  return std::shared_ptr<void>(data, [](void* lasting) {
    const CaptureModeGuard relaxed_again;
    cudaFree(lasting);
  });
}

// On a stream of its own that does not synchronize with the default stream: the streams of the
// program may be captured, and must neither take this copy in nor be waited for.
void copy_to_device_now(void* to, const void* from, int64_t bytes) {
  const CaptureModeGuard relaxed;
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const cudaError_t copied =
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream);
  const cudaError_t done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(copied, "cudaMemcpyAsync");
  check(done, "cudaStreamSynchronize");
}

Event::Event() : event_(nullptr) {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  event_ = event;
}

Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }

void Event::record(void* stream) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(stream)),
        "cudaEventRecord");
}

bool Event::is_done() const {
  const CaptureModeGuard relaxed;  // another thread may be capturing
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  if (status != cudaErrorNotReady) check(status, "cudaEventQuery");
  cudaGetLastError();  // that it is not ready is no error to be found later
  return status == cudaSuccess;
}

void Event::wait() const {
  const CaptureModeGuard relaxed;
  cudaEventSynchronize(static_cast<cudaEvent_t>(event_));
}

void update(const UpdateCall& call) {
  with_types(call.key, [&](auto rule, auto number) {
    const auto arguments = arguments_for<decltype(rule), decltype(number)>(call);
    const bool in_double = call.key.formats.in_double();
    launch(kernel_of(call.key.rule, in_double, call.key.kind), call.num_chunks, kBlockThreads,
           int64_t{kStages} * arguments.plan.stage_bytes, call.stream, arguments);
  });
}

void sum_squares(const SumSquaresCall& call) {
  if (call.num_leaves == 0) return;
  launch(call.in_double ? sum_squares_kernel_of<double>() : sum_squares_kernel_of<float>(),
         call.num_leaves, kBlockThreads, 0, call.stream, call.arguments);
}

void finalize_norm(const FinalizeArguments& arguments, void* stream) {
  launch(reinterpret_cast<const void*>(&finalize_kernel), 1, kFinalizeThreads, 0, stream,
         arguments);
}

void step_scalars(RuleId rule, const StepScalarsArguments& arguments, void* stream) {
  const int64_t blocks = (arguments.num_rows + kStepScalarsThreads - 1) / kStepScalarsThreads;
  launch(step_scalars_kernel_of(rule), blocks, kStepScalarsThreads, 0, stream, arguments);
}

}  // namespace runtime
}  // namespace fusedopt::cuda
