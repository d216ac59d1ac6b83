// The update kernel run on the host: what float.cu and double.cu are on a GPU. It is compiled for
// each of the types that compute by itself, as the kernels are, since it takes that long.
#pragma once

#include <cstring>
#include <functional>
#include <vector>

#include "core/flush.h"
#include "cuda/access.h"
#include "cuda/launch.h"

namespace fusedopt::cuda {

// All blocks of a launch whose kernel computes in T, to be called now or in each replay.
template <class T>
std::function<void()> emulated_update(const UpdateCall& call);
extern template std::function<void()> emulated_update<float>(const UpdateCall& call);
extern template std::function<void()> emulated_update<double>(const UpdateCall& call);

// The shared memory of a block, used for one block after the other.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : words_(static_cast<size_t>(bytes) / sizeof(Words<4>)) {}

  // For a new block. All bits are set, which is NaN in all formats of numbers: whoever reads what
  // it has not copied computes with NaNs, and a test sees them.
  SharedPlace renew() {
    std::memset(words_.data(), 0xff, words_.size() * sizeof(Words<4>));
    return shared_place(words_.data());
  }

 private:
  std::vector<Words<4>> words_;
};

// The update kernel. Float computation flushes subnormal numbers, as float.cu is compiled to.
template <class Rule, class T, class Kind>
void update_all(const UpdateArguments<Rule, T>& arguments, int64_t num_chunks) {
  const FlushMode flush(sizeof(T) == sizeof(float));
  SharedMemory shared(int64_t{kStages} * arguments.plan.stage_bytes);
  for (uint32_t block = 0; block < num_chunks; ++block) {
    LaneTalk talk = {};
    talk.said.resize(kBlockThreads);
    if (Kind::kHasCodes) lane_talk = &talk;
    for (talk.is_rehearsal = Kind::kHasCodes;; talk.is_rehearsal = false) {
      const SharedPlace place = shared.renew();
      for (talk.thread = 0; talk.thread < kBlockThreads; ++talk.thread)
        update_thread<Rule, T, Kind>(arguments, place, block, talk.thread);
      if (!talk.is_rehearsal) break;
    }
    lane_talk = nullptr;
    for (const LaneTalk::Store& store : talk.stores) std::memcpy(store.to, store.bytes, store.size);
  }
}

template <class T>
std::function<void()> emulated_update(const UpdateCall& call) {
  std::function<void()> work;
  with_rule(call.key.rule, [&](auto rule) {
    using Rule = decltype(rule);
    const auto arguments = arguments_for<Rule, T>(call);
    const int64_t num_chunks = call.num_chunks;
    const auto of_step = [&](auto step) {
      work = [=] { update_all<Rule, T, decltype(step)>(arguments, num_chunks); };
    };
    if (call.key.kind == kPlainKernel)
      of_step(PlainStep{});
    else if (call.key.kind == kCodesKernel)
      of_step(CodesStep{});
    else if constexpr (sizeof(T) == sizeof(float))
      with_usual_step<Rule>(call.key.kind - kUsualKernel, of_step);
  });
  return work;
}

}  // namespace fusedopt::cuda
