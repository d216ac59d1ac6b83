#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/step.h"
#include "cuda/access.h"
#include "cuda/thread_slice.h"
#include "cuda/tuning.h"

// Operands of dense works on their way into shared memory. Every thread copies the bytes that it
// needs to places of its own, some stages ahead, and reads no others: there is nothing to wait for
// but its own copies. A stage holds bytes, whatever the formats, which matter when they are read
// (cuda/staged.h). Bytes under way in shared memory take no registers, so there can be enough of
// them to keep a GPU's memory busy (cuda/tuning.h).
namespace fusedopt::cuda {

// A thread has kThreadElements at a time: in one piece if that makes 16 bytes of every operand,
// else in two, a warp or a block apart, so that neighbours always touch neighbouring bytes.
template <class T>
FUSEDOPT_HD constexpr uint32_t piece_elements(const Formats& formats) {
  bool is_narrow = sizeof(T) == sizeof(float);
  for (const DType dtype : formats.dtypes) is_narrow = is_narrow && item_size(dtype) <= 2;
  return static_cast<uint32_t>(is_narrow ? kThreadElements<T> : kThreadElements<T> / 2);
}

// Sets of operands. The lowest bit takes a GPU two instructions to test, and is not used.
FUSEDOPT_HD constexpr uint32_t only(int operand) { return 2u << operand; }

// Those that most steps have are copied, and read, without a branch between them.
FUSEDOPT_HD constexpr bool is_usual(int operand) { return operand < kFirstState + 2; }
inline constexpr uint32_t kUnusual = ~(only(kFirstState + 2) - 1);

// From one piece of 16 bytes to a thread's second.
inline constexpr uint32_t kNextPiece = 16 * kBlockThreads;
static_assert(kStages * kMaxOperands * 2 * kNextPiece <= kMaxSharedBytes,
              "every work must have room for all stages");

// What is the same for all works of a launch. It is among the kernel's arguments, where the
// compiler knows that all threads find the same and branch alike.
struct StagePlan {
  Words<2> formats;     // Formats
  uint32_t one_format;  // DType: of all operands, if all lie at multiples of their pieces' size
  // Sets of operands, by how their pieces are copied: in one access of so many bytes, or word by
  // word. Not at all: a float32 master is the weight, and the param then only written.
  uint32_t of16, of8, of4, in_words;
  uint32_t not_of16;             // the last three together
  uint32_t shifted;              // those that do not lie at multiples of their pieces' size
  uint32_t whole;                // those that do, and whose thread's elements are in one piece
  uint32_t has_two;              // pieces
  uint32_t sizes[kMaxOperands];  // of an element, in bytes
  // In a stage: of the first and the last 16 bytes that a thread has, which may be the same.
  uint32_t places[2][kMaxOperands];
  uint32_t stage_bytes;  // of a block
};

// Calls f(k), a constant, for the operands that works of a rule can have.
template <class Rule, class F>
FUSEDOPT_HD void for_operands(const F& f) {
  unroll<kMaxOperands>([&](auto k) __attribute__((always_inline)) {
    constexpr int kOperand = decltype(k)::value;
    if constexpr (kOperand < kFirstState + Rule::kNumStates || kOperand >= kMaster) f(k);
  });
}

// The operands of a work that do not lie at multiples of their pieces' size.
inline uint32_t shifted_operands(const ParamUpdate& update) {
  const uint32_t elements = update.formats.in_double() ? piece_elements<double>(update.formats)
                                                       : piece_elements<float>(update.formats);
  uint32_t shifted = 0;
  for (int k = 0; k < kMaxOperands && update.layout == kDense; ++k) {
    if (!update.formats.has(k)) continue;
    const uint32_t bytes = elements * static_cast<uint32_t>(item_size(update.formats.dtypes[k]));
    if ((reinterpret_cast<uintptr_t>(update.data[k]) & (bytes - 1)) != 0) shifted |= only(k);
  }
  return shifted;
}

template <class T>
StagePlan plan_stages(const Formats& formats, uint32_t shifted) {
  StagePlan plan = {};
  plan.formats = bit_cast<Words<2>>(formats);
  plan.shifted = shifted;
  plan.one_format =
      static_cast<uint32_t>(shifted == 0 ? formats.one_format(false) : DType::kAbsent);
  const uint32_t elements = piece_elements<T>(formats);
  plan.has_two = elements != kThreadElements<T>;
  for (int k = 0; k < kMaxOperands; ++k) {
    plan.sizes[k] = static_cast<uint32_t>(item_size(formats.dtypes[k]));
    if (!formats.has(k)) continue;
    const bool is_shifted = (shifted & only(k)) != 0;
    if (plan.has_two == 0 && !is_shifted) plan.whole |= only(k);
    if (k == kParam && formats.has_float32_master()) continue;
    const uint32_t bytes = plan.sizes[k] * elements;
    (is_shifted    ? plan.in_words
     : bytes == 16 ? plan.of16
     : bytes == 8  ? plan.of8
                   : plan.of4) |= only(k);
    if (is_shifted || bytes != 16) plan.not_of16 |= only(k);
    const uint32_t more = plan.sizes[k] * kThreadElements<T> == 32 ? kNextPiece : 0;
    for (const int found_as : {k, k == kMaster && formats.has_float32_master() ? kParam : k}) {
      plan.places[0][found_as] = plan.stage_bytes;
      plan.places[1][found_as] = plan.stage_bytes + more;
    }
    plan.stage_bytes += kNextPiece + more;
    // The last bytes of pieces at odd places are in one word more.
    if (is_shifted && plan.sizes[k] == 2) plan.stage_bytes += kBlockThreads * 8;
  }
  return plan;
}

// Elements [begin, end) of a work, for a thread among those that share them.
struct Chunk {
  const ParamUpdate* update;  // in device memory
  int64_t begin, end;
  ThreadSlice slice;
};

// A thread's pieces, counted from the chunk's start; the second is the first again where there is
// only one, or room for only one.
struct Tile {
  uint32_t at[2];
};

// The stages of one thread, for its part of a chunk of a dense work.
template <class Rule, class T>
class Stages {
  static constexpr uint32_t kCount = kThreadElements<T>;

 public:
  FUSEDOPT_HD Stages(const StagePlan& plan, const ParamUpdate& update, const Chunk& chunk,
                     uint32_t thread, SharedPlace shared)
      : plan_(plan),
        own_(opaque(shared + 16 * thread)),
        thread_(thread),
        first_pair_(static_cast<uint64_t>(chunk.begin) / 2) {
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      data_[k] = same_for_warp(static_cast<char*>(update.data[k]) + chunk.begin * plan.sizes[k]);
    });
    // The words of what is shifted must not reach beyond its own memory.
    const bool is_shifted = plan.shifted != 0;
    const uint32_t margin = is_shifted && chunk.end == update.numel ? 1 : 0;
    const auto n = static_cast<uint32_t>(chunk.end - chunk.begin);
    end_ = n > margin ? (n - margin) / piece_elements() : 0;
    first_ = is_shifted && chunk.begin == 0 && end_ > 0 ? 1 : 0;
    start_ = first_ + chunk.slice.rank;
    threads_ = chunk.slice.size;
    stride_ = opaque(has_two() ? 2 * threads_ : threads_);
  }

  FUSEDOPT_HD const StagePlan& plan() const { return plan_; }
  FUSEDOPT_HD uint64_t first_pair() const { return first_pair_; }       // of elements, of the chunk
  FUSEDOPT_HD char* data(int operand) const { return data_[operand]; }  // at the chunk's start

  FUSEDOPT_HD bool has_two() const { return plan_.has_two != 0; }
  FUSEDOPT_HD uint32_t piece_elements() const { return has_two() ? kCount / 2 : kCount; }
  FUSEDOPT_HD uint32_t piece_bytes(int operand) const {
    return plan_.sizes[operand] * piece_elements();
  }

  // Pieces [first(), end()) are staged; a thread takes those from start() on, at strides.
  FUSEDOPT_HD uint32_t first() const { return first_; }
  FUSEDOPT_HD uint32_t end() const { return end_; }
  FUSEDOPT_HD uint32_t start() const { return start_; }
  FUSEDOPT_HD uint32_t stride() const { return stride_; }
  FUSEDOPT_HD Tile tile(uint32_t at) const {
    return {{at, has_two() && at + threads_ < end_ ? at + threads_ : at}};
  }

  // One stage after the other, in turn.
  FUSEDOPT_HD SharedPlace first_stage() const { return own_; }
  FUSEDOPT_HD SharedPlace after(SharedPlace stage) const {
    const SharedPlace next = stage + plan_.stage_bytes;
    return next == own_ + kStages * plan_.stage_bytes ? own_ : next;
  }

  // Pieces of 16 bytes lie a block's apart, smaller ones side by side, so that one access reads
  // both.
  FUSEDOPT_HD void start_copies(const Tile& tile, SharedPlace stage) const {
    copy<16>(plan_.of16, tile.at[0], stage);
    if (has_two()) copy<16>(plan_.of16, tile.at[1], stage + kNextPiece);
    if (plan_.not_of16 == 0) return;
    if (plan_.of8 != 0) {
      copy<8>(plan_.of8, tile.at[0], stage);
      copy<8>(plan_.of8, tile.at[1], stage + 8);
    }
    if (sizeof(T) == sizeof(double) && plan_.of4 != 0) {
      copy<4>(plan_.of4, tile.at[0], stage);
      copy<4>(plan_.of4, tile.at[1], stage + 4);
    }
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if ((plan_.in_words & only(k)) != 0) copy_words(k, tile, stage);
    });
  }

  // Makes pieces of words that have arrived.
  FUSEDOPT_HD void align(SharedPlace stage) const {
    if (plan_.in_words == 0) return;
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if ((plan_.in_words & only(k)) != 0 && shift(k) != 0) align_words(k, stage);
    });
  }

 private:
  // In one run, without a branch between them: a GPU has to wait before the first after a branch.
  template <int kBytes>
  FUSEDOPT_HD void copy(uint32_t operands, uint32_t at, SharedPlace stage) const {
    const uint32_t wanted = opaque(operands), offset = at * kBytes;
    const auto start = [&](auto k) __attribute__((always_inline)) {
      start_copy_if<kBytes>(wanted & only(k), stage + plan_.places[0][k], data_[k] + offset);
    };
    if ((operands & kUnusual) != 0)
      for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
        if (!is_usual(k)) start(k);
      });
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if (is_usual(k)) start(k);
    });
  }

  // Of an operand's pieces, from a multiple of 4.
  FUSEDOPT_HD uint32_t shift(int operand) const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data_[operand])) & 3;
  }
  FUSEDOPT_HD SharedPlace place(int operand, SharedPlace stage, uint32_t piece) const {
    const uint32_t bytes = piece_bytes(operand);
    return stage + plan_.places[0][operand] + piece * (bytes == 16 ? kNextPiece : bytes);
  }
  // The last bytes of a piece that is shifted.
  FUSEDOPT_HD SharedPlace rest(int operand, SharedPlace stage, uint32_t piece) const {
    return stage + plan_.places[0][operand] + kNextPiece + 4 * kBlockThreads * piece - 12 * thread_;
  }

  FUSEDOPT_HD void copy_words(int operand, const Tile& tile, SharedPlace stage) const {
    const uint32_t bytes = piece_bytes(operand), shift = this->shift(operand);
#pragma unroll 1
    for (uint32_t p = 0; p <= plan_.has_two; ++p) {
      const SharedPlace to = place(operand, stage, p);
      const char* const from = data_[operand] + (p == 0 ? tile.at[0] : tile.at[1]) * bytes - shift;
#pragma unroll 1
      for (uint32_t i = 0; i < bytes; i += 4) start_copy_if<4>(1, to + i, from + i);
      if (shift != 0) start_copy_if<4>(1, rest(operand, stage, p), from + bytes);
    }
  }

  FUSEDOPT_HD void align_words(int operand, SharedPlace stage) const {
    const uint32_t bytes = piece_bytes(operand);
#pragma unroll 1
    for (uint32_t p = 0; p <= plan_.has_two; ++p) {
      const SharedPlace to = place(operand, stage, p);
      uint32_t word = load_shared<1>(to).words[0];
#pragma unroll 1
      for (uint32_t i = 0; i < bytes; i += 4) {
        const SharedPlace after = i + 4 < bytes ? to + (i + 4) : rest(operand, stage, p);
        const uint32_t next = load_shared<1>(after).words[0];
        store_shared(to + i, word_across(word, next, shift(operand)));
        word = next;
      }
    }
  }

  const StagePlan& plan_;
  const SharedPlace own_;  // in the first stage
  const uint32_t thread_;
  const uint64_t first_pair_;
  char* data_[kMaxOperands];  // at the chunk's start
  uint32_t first_, end_, start_, threads_, stride_;
};

}  // namespace fusedopt::cuda
