#include <atomic>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <vector>

#include "cuda/runtime.h"

// Runs the code of the kernels on the host, one thread after the other, in the driver's place of
// CUDA. Host memory is device memory.
namespace fusedopt::cuda {
namespace {

std::atomic<bool> g_emulates{false};
std::atomic<bool> g_captures{false};
std::vector<std::function<void()>> g_recorded;  // by one thread at a time

void enqueue(std::function<void()> work) {
  if (g_captures)
    g_recorded.push_back(std::move(work));
  else
    work();
}

template <class Format>
void update_all(const UpdateCall& call) {
  with_family(call.rule, [&](auto family) {
    using Family = decltype(family);
    const auto arguments = arguments_for<Family, typename Format::T>(call);
    enqueue([arguments, num_chunks = static_cast<uint32_t>(call.num_chunks)] {
      for (uint32_t block = 0; block < num_chunks; ++block)
        for (uint32_t thread = 0; thread < kBlockThreads; ++thread)
          update_thread<Family, Format>(arguments, block, thread);
    });
  });
}

template <class T>
void measure_leaf(const MeasureArguments& arguments, int64_t i) {
  const Leaf leaf = load_leaf(arguments, i);
  if (!is_measured_in<T>(leaf.work)) return;
  double values[kLeafThreads];
  for (uint32_t thread = 0; thread < kLeafThreads; ++thread)
    values[thread] = measure_thread<T>(leaf, arguments.layouts, thread);
  GradSum sum = {sum_block(values, kLeafThreads), 0, leaf.work.norm_class};
  for (uint32_t thread = 0; thread < kLeafThreads && is_nonfinite(sum.squares); ++thread)
    sum.nonfinite += count_thread<T>(leaf, arguments.layouts, thread);
  arguments.sums[i] = sum;
}

}  // namespace

const char* unavailable_reason() { return nullptr; }

std::string architectures() { return "emulated"; }

bool is_emulated() { return g_emulates; }

bool is_capturing(int, void*) { return g_captures; }

const Emulation* emulation() {
  static constexpr Emulation kEmulation = {[](bool emulate) { g_emulates = emulate; },
                                           [] {
                                             g_recorded.clear();
                                             g_captures = true;
                                           },
                                           [] { g_captures = false; },
                                           [] {
                                             for (const auto& work : g_recorded) work();
                                           }};
  return &kEmulation;
}

namespace runtime {

OnGpu::OnGpu(int) : before_(nullptr) {}
OnGpu::~OnGpu() = default;

void check_kernels(int, RuleId, int) {}

void copy_to_device(void* to, const void* from, int64_t bytes, void*) {
  if (g_captures) throw std::runtime_error("a copy from memory that will be used again");
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

std::shared_ptr<void> allocate_lasting(int64_t bytes) {
  void* const data = std::aligned_alloc(256, static_cast<size_t>(bytes));  // as CUDA aligns it
  return std::shared_ptr<void>(data, std::free);
}

void copy_to_device_now(void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

Point::Point() : event_(nullptr) {}
Point::~Point() = default;
void Point::record(void*) {}
bool Point::is_passed() const { return true; }
void Point::wait() const {}

void update(const UpdateCall& call) {
  with_format(call.column, [&](auto format) { update_all<typename decltype(format)::Name>(call); });
}

void measure(const MeasureCall& call) {
  enqueue([call] {
    for (int64_t i = 0; i < call.num_leaves; ++i) {
      if (call.in_float) measure_leaf<float>(call.arguments, i);
      if (call.in_double) measure_leaf<double>(call.arguments, i);
    }
  });
}

void total(const TotalArguments& arguments, const JudgeArguments& judging, void*) {
  enqueue([arguments, judging] {
    sum_leaves(arguments.sums, arguments.num_leaves, arguments.norm_class, arguments.total);
    judge_thread(judging);
  });
}

void judge(const JudgeArguments& arguments, void*) {
  enqueue([arguments] { judge_thread(arguments); });
}

void schedule(RuleId rule, const ScheduleArguments& arguments, void*) {
  with_family(rule, [&](auto family) {
    enqueue([arguments] {
      for (int64_t row = 0; row < arguments.num_rows; ++row)
        schedule_thread<decltype(family)>(arguments, row);
    });
  });
}

}  // namespace runtime
}  // namespace fusedopt::cuda
