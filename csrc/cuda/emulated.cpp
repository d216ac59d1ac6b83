// Takes the place of runtime.cu in builds for tests: runs the code of the kernels on the host, one
// thread after the other, with host memory as device memory. It works because no thread of a kernel
// waits for another, with two exceptions: the threads of a block where sums of squares are put
// together, and the lanes of a warp for the scale of a group of codes (LaneTalk).

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "core/emulation.h"
#include "core/flush.h"
#include "cuda/emulated_update.h"
#include "cuda/runtime.h"

namespace fusedopt::cuda {
namespace {

std::atomic<bool> g_emulates{false};
std::atomic<bool> g_captures{false};
std::vector<std::function<void()>> g_recorded;  // used by one thread at a time

// Runs a kernel at once, or records it for replays, as a captured stream does.
void enqueue(std::function<void()> update) {
  if (g_captures)
    g_recorded.push_back(std::move(update));
  else
    update();
}

// One block of sum_squares_kernel.
template <class T>
void sum_leaf(const SumSquaresArguments& arguments, int64_t i) {
  const FlushMode flush(sizeof(T) == sizeof(float));
  const Leaf leaf = load_leaf(arguments, i);
  if (leaf.update.device == kIdle) return;
  NormSums& sums = arguments.sums[leaf.update.norm_class];
  for (uint32_t thread = 0; thread < kBlockThreads; ++thread) {
    const ThreadSum<T> own = sum_thread<T>(leaf, arguments.layouts, thread, sums);
    for (int k = 0; k < kSlices<T>; ++k)
      bins_of<T>(sums)[own.bin - k] += slice_sum<T>(own.slices[k], own.count, k);
  }
}

}  // namespace

const char* unavailable_reason() { return nullptr; }

std::string architectures() { return "emulated"; }

bool is_emulated() { return g_emulates; }

bool is_capturing(int, void*) { return g_captures; }

namespace emulation {

void use(bool emulate) { g_emulates = emulate; }

void begin_capture() {
  g_recorded.clear();
  g_captures = true;
}

void end_capture() { g_captures = false; }

void replay() {
  for (const auto& update : g_recorded) update();
}

}  // namespace emulation

namespace runtime {

DeviceGuard::DeviceGuard(int) : before_(nullptr) {}
DeviceGuard::~DeviceGuard() = default;

void check_kernels(int) {}

void copy_to_device(void* to, const void* from, int64_t bytes, void*) {
  // A real graph would repeat the copy in each replay, when the source holds something else.
  if (g_captures) throw std::runtime_error("a copy from memory that will be used again");
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void clear(void* data, int64_t bytes, void*) {
  enqueue([data, bytes] { std::memset(data, 0, static_cast<size_t>(bytes)); });
}

std::shared_ptr<void> allocate_persistent(int64_t bytes) {
  void* const data = std::aligned_alloc(256, static_cast<size_t>(bytes));  // as CUDA aligns it
  return std::shared_ptr<void>(data, std::free);
}

void copy_to_device_now(void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// All that is enqueued has run when the call returns.
Event::Event() : event_(nullptr) {}
Event::~Event() = default;
void Event::record(void*) {}
bool Event::is_done() const { return true; }
void Event::wait() const {}

void update(const UpdateCall& call) {
  enqueue(call.key.formats.in_double() ? emulated_update<double>(call)
                                       : emulated_update<float>(call));
}

void sum_squares(const SumSquaresCall& call) {
  enqueue([call] {
    for (int64_t i = 0; i < call.num_leaves; ++i)
      call.in_double ? sum_leaf<double>(call.arguments, i) : sum_leaf<float>(call.arguments, i);
  });
}

void finalize_norm(const FinalizeArguments& arguments, void*) {
  enqueue([arguments] { finalize_thread(arguments, highest_bins(*arguments.sums)); });
}

void step_scalars(RuleId rule, const StepScalarsArguments& arguments, void*) {
  with_rule(rule, [&](auto known) {
    enqueue([arguments] {
      for (int64_t row = 0; row < arguments.num_rows; ++row)
        step_scalars_thread<decltype(known)>(arguments, row);
    });
  });
}

}  // namespace runtime
}  // namespace fusedopt::cuda
