// What one thread of an update kernel does. There is one kernel for a rule and the type it computes
// in, for updates in any formats, and more for codes and for usual steps (cuda/usual.h). No thread
// needs another one, but to find the scales of codes (largest_of_lanes() of cuda/access.h), so the
// emulation on the host can go through the threads one after the other and get what a GPU gives.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/branch_free.h"
#include "core/element.h"
#include "core/rules.h"
#include "core/step.h"
#include "cuda/singles.h"
#include "cuda/stage.h"
#include "cuda/staged.h"
#include "cuda/thread_slice.h"
#include "cuda/tuning.h"
#include "cuda/usual.h"

namespace fusedopt::cuda {

// The kernel's arguments, for which CUDA has room for 4 KiB. All pointers are into device memory.
// Where the scalars of all groups fit, they are passed here, and no table of them has to be copied
// to the device.
template <class Rule, class T>
struct UpdateArguments {
  using UpdateScalars = StepScalars<Rule, T>;
  static constexpr int kFew = 3072 / static_cast<int>(sizeof(UpdateScalars));

  const ParamUpdate* updates;
  const ChunkStart* chunks;  // one for each block, and the end
  const Layout* layouts;
  const UpdateScalars* scalars;  // by ParamUpdate::scalars; nullptr: they are in `few`
  const float* skip;             // a value above 0 makes the step do nothing; nullptr: always step
  StagePlan plan;
  UpdateScalars few[kFew];
};

// A thread's part in the update of one chunk.
template <class Rule, class T, class Kind>
class ChunkUpdate {
 public:
  using Arguments = UpdateArguments<Rule, T>;

  FUSEDOPT_HD ChunkUpdate(const Arguments& arguments, const Chunk& chunk,
                          const StepScalars<Rule, T>& scalars, uint32_t variant)
      : arguments_(arguments), chunk_(chunk), scalars_(scalars), variant_(variant) {}

  // A software pipeline over kStages stages of shared memory. kStages - 1 tiles are copied in
  // advance; each turn then starts one more copy, waits for the oldest, and computes. The copy of a
  // turn goes to the stage that the turn before has read.
  FUSEDOPT_HD void run_dense(const Stages<Rule, T, Kind>& stages) const {
    const uint32_t stride = stages.stride(), end = stages.end(), piece = stages.piece_elements();
    uint32_t next = stages.start();  // to be copied
    const auto copy_next = [&](SharedPlace stage) __attribute__((always_inline)) {
      if (next < end) stages.start_copies(stages.tile(next), stage);
      end_copies();  // a group for each turn, an empty one at the end, so that counts stay right
      next += stride;
    };
    SharedPlace stage = stages.first_stage();
#pragma unroll 1
    while (stages.after(stage) != stages.first_stage()) {
      copy_next(stage);
      stage = stages.after(stage);
    }
#pragma unroll 1
    for (uint32_t at = stages.start(); at < end; at += stride) {
      copy_next(stage);
      wait_for_copies<kStages - 1>();  // this thread's own; it reads no others', so no barrier
      stage = stages.after(stage);
      stages.align(stage);
      const Tile tile = stages.tile(at);
      Staged<Rule, T, Kind> staged(stages, tile, stage);
      if constexpr (Kind::kHasCodes) {
        update_exactly(staged);
      } else {
        Math math;
        if (update_elements(staged, math)) continue;
        // Rare: an operand for which the branch-free mathematics is not exact. Nothing has been
        // stored yet, so all elements of the tile are read again from global memory.
        const uint32_t count = tile.at[1] != tile.at[0] ? 2 * piece : piece;
#pragma unroll 1
        for (uint32_t i = 0; i < count; ++i)
          update_single(chunk_.begin +
                        (i < piece ? tile.at[0] * piece + i : tile.at[1] * piece + i - piece));
      }
    }
    // What fills no piece, about one piece at either end of the chunk.
    const uint32_t head = stages.first() * piece, staged_elements = end * piece - head;
    const uint32_t left = static_cast<uint32_t>(chunk_.end - chunk_.begin) - staged_elements;
    if constexpr (Kind::kHasCodes) {
      run_groups(chunk_.begin, chunk_.begin + head);
      run_groups(chunk_.begin + head + staged_elements, chunk_.end);
    } else {
#pragma unroll 1
      for (uint32_t i = chunk_.slice.rank; i < left; i += chunk_.slice.size)
        update_single(chunk_.begin + i + (i < head ? 0 : staged_elements));
    }
  }

  // Neighbouring threads do neighbouring elements. Each does two at a time, so that their loads
  // overlap; the second is the first again at the end.
  FUSEDOPT_HD void run_strided() const {
    constexpr int kAtATime = 2;
    const int64_t step = kAtATime * chunk_.slice.size;
#pragma unroll 1
    for (int64_t i = chunk_.begin + chunk_.slice.rank; i < chunk_.end; i += step) {
      Singles<T, kAtATime, Kind> singles(chunk_.update, arguments_.layouts);
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) {
        const int64_t own = i + j * chunk_.slice.size;
        singles.place(j, own < chunk_.end ? own : i);
      }
      Math math;
      if (update_elements(singles, math)) continue;
#pragma unroll 1
      for (int64_t own = i; own < chunk_.end && own < i + step; own += chunk_.slice.size)
        update_single(own);
    }
  }

  // Elements [begin, end), which begin with a group of codes: a warp does one group at a time.
  FUSEDOPT_HD void run_groups(int64_t begin, int64_t end) const {
    constexpr int kOfThread = kGroup / kWarp;
    const uint32_t lane = chunk_.slice.rank % kWarp, warps = chunk_.slice.size / kWarp;
#pragma unroll 1
    for (int64_t group = begin + chunk_.slice.rank / kWarp * kGroup; group < end;
         group += int64_t{warps} * kGroup) {
      Singles<T, kOfThread, Kind> singles(chunk_.update, arguments_.layouts);
#pragma unroll
      for (int j = 0; j < kOfThread; ++j) {
        const int64_t own = group + j * kWarp + lane;
        singles.place(j, own < end ? own : end - 1);
        if (own >= end) singles.mute(j);
      }
      IeeeForCodes ieee;
      update_elements(singles, ieee);
    }
  }

 private:
  // In float, square roots and divisions take no branch (core/branch_free.h). In double they are
  // the compiler's own: steps in float64 are rare enough for these to be slow.
  using Math = std::conditional_t<sizeof(T) == sizeof(float), BranchFree<>, Ieee>;

  // opaque() keeps the tests of the variant from being held over the loop.
  FUSEDOPT_HD typename Rule::Variant variant() const {
    const auto found = Rule::Variant::of(opaque(variant_));
    if constexpr (Kind::kIsUsual)
      return Usual<Rule>::known(found);
    else
      return found;
  }

  // Computes all elements of `memory`. Returns false, and has stored nothing, if `math` was not
  // exact for one of them.
  template <class Memory, class AnyMath>
  FUSEDOPT_HD bool update_elements(const Memory& memory, AnyMath& math) const {
    Elements<Rule, T, typename Memory::Values, Memory> elements(memory);
    elements.load();
    elements.apply(variant(), scalars_.rule, math);
    if (!math.is_exact()) return false;
    elements.finish(scalars_.common);
    return true;
  }

  // The same for elements whose scales other threads need: all of them get to their ends.
  template <class Memory>
  FUSEDOPT_HD void update_exactly(Memory& memory) const {
    const auto variant = this->variant();
    Elements<Rule, T, typename Memory::Values, Memory> elements(memory);
    BranchFreeForCodes math;
    elements.load();
    elements.apply(variant, scalars_.rule, math);
    if (!math.is_exact()) {  // rare
      IeeeForCodes ieee;
      memory.read_again();
      elements.load();
      elements.apply(variant, scalars_.rule, ieee);
    }
    elements.finish(scalars_.common);
  }

  // One element, with the compiler's exact square root and division.
  FUSEDOPT_HD void update_single(int64_t element) const {
    Singles<T, 1, Kind> single(chunk_.update, arguments_.layouts);
    single.place(0, element);
    Ieee ieee;
    update_elements(single, ieee);
  }

  const Arguments& arguments_;
  const Chunk& chunk_;
  const StepScalars<Rule, T>& scalars_;
  const uint32_t variant_;
};

// All that thread number `thread` of block number `block` does. same_for_warp() tells the compiler
// which numbers are equal in all threads of a warp: they are then kept in uniform registers, once
// for the warp, and what branches on them does not diverge.
template <class Rule, class T, class Kind>
FUSEDOPT_HD void update_thread(const UpdateArguments<Rule, T>& arguments, SharedPlace shared,
                               uint32_t block, uint32_t thread) {
  if (arguments.skip != nullptr && *arguments.skip > 0) return;
  const ChunkStart from = arguments.chunks[block], to = arguments.chunks[block + 1];
  // A chunk is a part of one update, for the whole block, or several small ones, for a warp each.
  const bool is_shared = to.update - from.update <= 1;
  const int64_t at = same_for_warp(from.update + (is_shared ? 0 : thread / kWarp));
  if (!is_shared && at >= to.update) return;
  const ParamUpdate update = load_update(arguments.updates + at);
  if (update.device == kIdle) return;
  const ThreadSlice slice =
      is_shared ? ThreadSlice{thread, kBlockThreads} : ThreadSlice{thread % kWarp, kWarp};
  const Chunk chunk = {arguments.updates + at, same_for_warp(at == from.update ? from.element : 0),
                       same_for_warp(at == to.update ? to.element : update.numel), slice};
  // A copy: a reference to either of the two places would be into an unknown address space, which
  // would have to be found out at each access.
  const StepScalars<Rule, T> scalars =
      same_for_warp(arguments.scalars != nullptr ? arguments.scalars[update.scalars]
                                                 : arguments.few[update.scalars]);
  const uint32_t variant = same_for_warp(uint32_t{update.variant});
  const ChunkUpdate<Rule, T, Kind> chunk_update(arguments, chunk, scalars, variant);
  const bool is_dense = update.layout == kDense;
  if constexpr (Kind::kIsUsual) {
    StagePlan plan = plan_stages<T>(Kind::formats(), 0);
    plan.formats = arguments.plan.formats;
    chunk_update.run_dense(Stages<Rule, T, Kind>(plan, update, chunk, thread, shared));
  } else if constexpr (Kind::kHasCodes) {
    if constexpr (sizeof(T) == sizeof(float)) {  // pieces of doubles are too small for bytes
      if (is_dense)
        return chunk_update.run_dense(
            Stages<Rule, T, Kind>(arguments.plan, update, chunk, thread, shared));
    }
    chunk_update.run_groups(chunk.begin, chunk.end);
  } else {
    const bool has_pieces = sizeof(T) == sizeof(float) || !update.formats.has_split8_master();
    if (is_dense && has_pieces)
      chunk_update.run_dense(Stages<Rule, T, Kind>(arguments.plan, update, chunk, thread, shared));
    else
      chunk_update.run_strided();
  }
}

}  // namespace fusedopt::cuda
