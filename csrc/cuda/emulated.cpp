#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "core/flush.h"
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

// Everything that blocks share.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : words_(static_cast<size_t>(bytes) / sizeof(Words<4>)) {}

  // Of a new block, with nothing of use in it.
  SharedPlace renew() {
    std::memset(words_.data(), 0xff, words_.size() * sizeof(Words<4>));
    return shared_place(words_.data());
  }

 private:
  std::vector<Words<4>> words_;
};

template <class Rule, class T>
void update_all(const UpdateArguments<Rule, T>& arguments, int64_t num_chunks) {
  const FlushMode flush(sizeof(T) == sizeof(float));
  SharedMemory shared(int64_t{kStages} * arguments.plan.stage_bytes);
  for (uint32_t block = 0; block < num_chunks; ++block) {
    const SharedPlace place = shared.renew();
    for (uint32_t thread = 0; thread < kBlockThreads; ++thread)
      update_thread(arguments, place, block, thread);
  }
}

template <class T>
void measure_leaf(const MeasureArguments& arguments, int64_t i) {
  const FlushMode flush(sizeof(T) == sizeof(float));
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

void check_kernels(int) {}

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
  with_types(call.column, [&](auto rule, auto number) {
    const auto arguments = arguments_for<decltype(rule), decltype(number)>(call);
    enqueue([arguments, num_chunks = call.num_chunks] { update_all(arguments, num_chunks); });
  });
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
  with_rule(rule, [&](auto known) {
    enqueue([arguments] {
      for (int64_t row = 0; row < arguments.num_rows; ++row)
        schedule_thread<decltype(known)>(arguments, row);
    });
  });
}

}  // namespace runtime
}  // namespace fusedopt::cuda
