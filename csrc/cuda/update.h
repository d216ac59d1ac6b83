#pragma once

#include <cstdint>
#include <type_traits>

#include "core/branch_free.h"
#include "core/element.h"
#include "core/rules.h"
#include "core/step.h"
#include "cuda/lane.h"
#include "cuda/singles.h"
#include "cuda/stage.h"
#include "cuda/tuning.h"

// What one thread of the update kernel does: one text for a rule and the type it computes in, for
// works in any format. Threads share nothing, so the host can go through them one after the other
// and get what a GPU gives.
namespace fusedopt::cuda {

// The kernel's arguments, at most 4 KiB. All pointers are into device memory.
template <class Rule, class T>
struct UpdateArguments {
  using WorkScalars = StepScalars<Rule, T>;
  static constexpr int kFew = 3072 / static_cast<int>(sizeof(WorkScalars));

  const Work* works;
  const ChunkStart* chunks;  // one for each block, and the end
  const Layout* layouts;
  const WorkScalars* scalars;  // by Work::scalars; nullptr: they are in `few`
  const float* skip;           // nullptr or the flag that makes the step do nothing
  uint32_t warp_bytes;         // of shared memory, for each warp; a multiple of 16
  WorkScalars few[kFew];
};

// What is the same for all elements of a work.
template <class Rule, class T>
class Update {
 public:
  FUSEDOPT_HD Update(const Work& work, const StepScalars<Rule, T>& scalars)
      : scalars_(scalars), formats_(bit_cast<Packed>(work.formats)), variant_(work.variant) {}

  FUSEDOPT_HD void run_dense(const Staged<Rule, T>& staged) const {
    run_staged(staged);
    const Chunk chunk = staged.chunk();
    const uint32_t head = staged.first(), tail = staged.end();
    const uint32_t left = static_cast<uint32_t>(chunk.end - chunk.begin) - (tail - head);
#pragma unroll 1
    for (uint32_t i = chunk.lane.index; i < left; i += chunk.lane.count)
      update_single(chunk.work, chunk.begin + i + (i < head ? 0 : tail - head));
  }

  // Neighbours by neighbouring threads. Several at a time: their loads overlap.
  FUSEDOPT_HD void run_strided(const Chunk& chunk, const Layout& layout, bool is_small) const {
    constexpr int kAtATime = 2;
    const int64_t step = kAtATime * chunk.lane.count;
#pragma unroll 1
    for (int64_t i = chunk.begin + chunk.lane.index; i < chunk.end; i += step) {
      Singles<T, kAtATime, false> singles(chunk.work);
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) {
        const int64_t own = i + j * chunk.lane.count;
        singles.place(j, layout, own < chunk.end ? own : i, is_small);
      }
      Math math;
      if (update<kAtATime>(singles, math)) continue;
#pragma unroll 1
      for (int64_t own = i; own < chunk.end && own < i + step; own += chunk.lane.count) {
        Singles<T, 1, false> single(chunk.work);
        single.place(0, layout, own, is_small);
        Ieee ieee;
        update<1>(single, ieee);
      }
    }
  }

 private:
  // Square roots and divisions in double are IEEE's own: rare enough to be slow.
  using Math = std::conditional_t<sizeof(T) == sizeof(float), BranchFree<>, Ieee>;

  struct Packed {
    uint32_t words[2];
  };

  FUSEDOPT_HD Formats formats() const {
    return bit_cast<Formats>(Packed{{as_if_new(formats_.words[0]), as_if_new(formats_.words[1])}});
  }

  // The copies are so many stages ahead that they go where the last elements were read.
  FUSEDOPT_HD void run_staged(const Staged<Rule, T>& staged) const {
    const uint32_t stride = staged.stride(), end = staged.end();
    uint32_t next = staged.start();  // to be copied
    const auto copy_next = [&](SharedPlace stage) __attribute__((always_inline)) {
      if (next < end) staged.start_copies(staged.tile(next), stage);
      end_copies();
      next += stride;
    };
    SharedPlace stage = staged.first_stage();
#pragma unroll 1
    while (staged.after(stage) != staged.first_stage()) {
      copy_next(stage);
      stage = staged.after(stage);
    }
#pragma unroll 1
    for (uint32_t at = staged.start(); at < end; at += stride) {
      copy_next(stage);
      if (staged.has_all_stages())
        wait_for_copies<kStages - 1>();
      else
        wait_for_copies<0>();
      stage = staged.after(stage);
      const Tile tile = staged.tile(at);
      Math math;
      if (!update<kThreadElements<T>>(typename Staged<Rule, T>::Memory(staged, tile, stage), math))
        update_again(staged, tile);
    }
  }

  // All at once; false if `math` does not do for one of them, and then nothing is stored.
  template <int kCount, class Memory, class AnyMath>
  FUSEDOPT_HD bool update(const Memory& memory, AnyMath& math) const {
    const Formats known = formats();
    Elements<Rule, T, T, kCount, Memory> elements(known, memory);
    elements.load();
    with_variant<Rule>(variant_, [&](auto variant) __attribute__((always_inline)) {
      elements.template apply<decltype(variant)::value>(scalars_.rule, math);
    });
    if (!math.is_exact()) return false;
    elements.finish(scalars_.common);
    return true;
  }

  FUSEDOPT_HD void update_again(const Staged<Rule, T>& staged, const Tile& tile) const {
    const uint32_t piece = staged.piece_elements();
    const uint32_t count = tile.at[1] != tile.at[0] ? 2 * piece : piece;
    const Chunk chunk = staged.chunk();
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i)
      update_single(chunk.work,
                    chunk.begin + (i < piece ? tile.at[0] + i : tile.at[1] + i - piece));
  }

  FUSEDOPT_HD void update_single(const Work* work, int64_t element) const {
    Singles<T, 1, true> single(work);
    single.place(0, element);
    Ieee ieee;
    update<1>(single, ieee);
  }

  const StepScalars<Rule, T>& scalars_;
  const Packed formats_;
  const uint32_t variant_;
};

// All that thread number `thread` of block number `block` does.
template <class Rule, class T>
FUSEDOPT_HD void update_thread(const UpdateArguments<Rule, T>& arguments, SharedPlace shared,
                               uint32_t block, uint32_t thread) {
  if (arguments.skip != nullptr && *arguments.skip > 0) return;
  const ChunkStart from = arguments.chunks[block], to = arguments.chunks[block + 1];
  // A part of one work for the whole block, or a work for each warp.
  const bool is_shared = to.work - from.work <= 1;
  const int64_t w = from.work + (is_shared ? 0 : thread / kWarp);
  if (!is_shared && w >= to.work) return;
  const Work work = load_work(arguments.works + w);
  if (work.device == kIdle) return;
  const Lane lane = is_shared ? Lane{thread, kBlockThreads} : Lane{thread % kWarp, kWarp};
  const Chunk chunk = {arguments.works + w, w == from.work ? from.element : 0,
                       w == to.work ? to.element : work.numel, lane};
  // A copy: a reference to one place or another would be of an unknown address space.
  const StepScalars<Rule, T> scalars =
      arguments.scalars != nullptr ? arguments.scalars[work.scalars] : arguments.few[work.scalars];
  const Update<Rule, T> update(work, scalars);
  if (work.layout == kDense)
    update.run_dense(Staged<Rule, T>(
        chunk, work, thread, shared + thread / kWarp * arguments.warp_bytes, arguments.warp_bytes));
  else
    update.run_strided(chunk, arguments.layouts[work.layout], work.numel <= INT32_MAX);
}

}  // namespace fusedopt::cuda
