// Copies the operands of dense updates from global into shared memory, ahead of their use, with
// cp.async, the asynchronous copy of GPUs since sm_80.
//
// Why: the step is bound by memory, and to keep a GPU's memory busy, enough bytes must be under way
// at any time. Bytes on their way into shared memory take no registers, so there can be enough of
// them (cuda/tuning.h, kStages).
//
// Every thread copies the bytes that it needs to places of its own and reads no others. So a thread
// waits only for its own copies, and the block needs no barrier. A stage holds bytes whatever their
// formats, which matter only when the bytes are read (cuda/staged.h).
#pragma once

#include <cstdint>

#include "core/element.h"
#include "core/step.h"
#include "cuda/access.h"
#include "cuda/thread_slice.h"
#include "cuda/tuning.h"
#include "cuda/usual.h"

namespace fusedopt::cuda {

// Elements in one piece. A thread computes kThreadElements at a time. If they take at most 16 bytes
// in every operand, they are one piece. Else they are two, which lie a warp or a block of pieces
// apart: so each access takes at most 16 bytes of a thread, the widest there is, and neighbouring
// threads touch neighbouring bytes, which makes the accesses coalesced.
template <class T>
FUSEDOPT_HD constexpr uint32_t piece_elements(const Formats& formats) {
  bool is_narrow = sizeof(T) == sizeof(float);
  for (const DType dtype : formats.dtypes) is_narrow = is_narrow && item_size(dtype) <= 2;
  return static_cast<uint32_t>(is_narrow ? kThreadElements<T> : kThreadElements<T> / 2);
}

// Sets of operands, a bit for each. The lowest bit takes a GPU two instructions to test, so it is
// not used.
FUSEDOPT_HD constexpr uint32_t only(int operand) { return 2u << operand; }

// The operands that most steps have: param, grad and the first two states. They are copied and read
// in one run, without a branch for each.
FUSEDOPT_HD constexpr bool is_common(int operand) { return operand < kFirstState + 2; }
inline constexpr uint32_t kUncommon = ~(only(kFirstState + 2) - 1);

// Bytes from a thread's first piece of 16 bytes to its second in a stage: the first pieces of all
// threads of the block lie side by side, so that a warp's accesses to shared memory have no bank
// conflicts.
inline constexpr uint32_t kNextPiece = 16 * kBlockThreads;
static_assert(kStages * kMaxOperands * 2 * kNextPiece <= kMaxSharedBytes,
              "every update must have room for all stages");

// How the operands of a launch are staged. The host finds it out once for each launch, from the
// formats and the alignment, and passes it among the kernel's arguments. The compiler knows that
// these are the same for all threads, so what depends on them is a uniform branch, which costs a
// warp no divergence. That is why one kernel can serve all formats.
struct StagePlan {
  Words<2> formats;     // Formats
  uint32_t one_format;  // the DType of all operands if they have one and what is stored is aligned
  // Sets of operands, by how a piece is copied: in one access of 16, 8 or 4 bytes, or, if it is
  // misaligned, in several. With a float32 master the param is in none of them: the master is the
  // weight, and the param is only written.
  uint32_t of16, of8, of4, in_parts;
  uint32_t not_of16;             // the last three together
  uint32_t shifted;              // misaligned: not at a multiple of the size of a piece
  uint32_t whole;                // aligned, and a thread's elements are one piece
  uint32_t has_two;              // 1 if a thread has two pieces at a time, else 0
  uint32_t group_shift;          // a group of codes has 1 << group_shift pieces; 0: no codes
  uint32_t sizes[kMaxOperands];  // of an element, in bytes
  // Offsets in a stage: where the first and where the last 16 bytes of a thread begin. They are the
  // same for an operand of which a thread has no more than 16.
  uint32_t places[2][kMaxOperands];
  uint32_t stage_bytes;  // of a whole block
};

// Calls f(k) with a constant k for each operand that a rule's updates can have, so that arrays
// indexed by k are in registers.
template <class Rule, class F>
FUSEDOPT_HD void for_operands(const F& f) {
  unroll<kMaxOperands>([&](auto k) __attribute__((always_inline)) {
    constexpr int kOperand = decltype(k)::value;
    if constexpr (kOperand < kFirstState + Rule::kNumStates || kOperand >= kMaster) f(k);
  });
}

// The misaligned operands of an update: those that do not lie at a multiple of the size of a piece,
// as wide accesses require. A grad that is a view into a bucket of DDP is an example.
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

// Assigns each operand its kind of copy and its place in a stage, one operand after the other.
template <class T>
FUSEDOPT_HD StagePlan plan_stages(const Formats& formats, uint32_t shifted) {
  StagePlan plan = {};
  plan.formats = bit_cast<Words<2>>(formats);
  plan.shifted = shifted;
  const bool stores_aligned = (shifted & ~only(kGrad)) == 0;
  plan.one_format =
      static_cast<uint32_t>(stores_aligned ? formats.one_format(false) : DType::kAbsent);
  const uint32_t elements = piece_elements<T>(formats);
  plan.has_two = elements != kThreadElements<T>;
  if (formats.has_codes()) plan.group_shift = elements == 8 ? 3 : elements == 4 ? 4 : 5;
  for (int k = 0; k < kMaxOperands; ++k) {
    plan.sizes[k] = static_cast<uint32_t>(item_size(formats.dtypes[k]));
    if (!formats.has(k)) continue;
    const bool is_shifted = (shifted & only(k)) != 0;
    if (plan.has_two == 0 && !is_shifted) plan.whole |= only(k);
    if (k == kParam && formats.has_float32_master()) continue;
    const uint32_t bytes = plan.sizes[k] * elements;
    (is_shifted    ? plan.in_parts
     : bytes == 16 ? plan.of16
     : bytes == 8  ? plan.of8
                   : plan.of4) |= only(k);
    if (is_shifted || bytes != 16) plan.not_of16 |= only(k);
    const uint32_t more = plan.sizes[k] * kThreadElements<T> == 32 ? kNextPiece : 0;
    plan.places[0][k] = plan.stage_bytes;
    plan.places[1][k] = plan.stage_bytes + more;
    // A float32 master is also found as the param: that place is among the usual ones, which are
    // read first.
    if (k == kMaster && formats.has_float32_master())
      for (uint32_t (&places)[kMaxOperands] : plan.places) places[kParam] = places[kMaster];
    plan.stage_bytes += kNextPiece + more;
    // Behind a misaligned piece's first half (copy_parts).
    if (is_shifted && plan.sizes[k] <= 2) plan.stage_bytes += kNextPiece;
  }
  return plan;
}

// Elements [begin, end) of an update, and which of the threads that do them together this one is.
struct Chunk {
  const ParamUpdate* update;  // in device memory
  int64_t begin, end;
  ThreadSlice slice;
};

// The numbers of a thread's two pieces in one turn, counted from the chunk's start. The second is
// the first again if the plan has one piece, or if the chunk has no piece left for it: what is
// computed and written twice is the same.
struct Tile {
  uint32_t at[2];
};

// The copies of one thread, for its part of a chunk of a dense update. A thread has 8 bytes of an
// operand that is codes; in its place in a stage, the scales of its two pieces come behind them.
template <class Rule, class T, class Kind>
class Stages {
  static constexpr uint32_t kCount = kThreadElements<T>;
  static constexpr bool kHasCodes = Kind::kHasCodes;
  // Where there are codes, all lanes of a warp have pieces in a turn, or none has: they find the
  // scales of groups together.
  static constexpr uint32_t kUnit = kHasCodes ? kWarp : 1;

 public:
  FUSEDOPT_HD Stages(const StagePlan& plan, const ParamUpdate& update, const Chunk& chunk,
                     uint32_t thread, SharedPlace shared)
      : plan_(plan),
        own_(opaque(shared + 16 * thread)),
        thread_(thread),
        first_pair_(static_cast<uint64_t>(update.first_element + chunk.begin) / 2) {
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      data_[k] = same_for_warp(static_cast<char*>(update.data[k]) + chunk.begin * plan.sizes[k]);
    });
    if constexpr (kHasCodes)
      for (int s = 0; s < Rule::kNumStates; ++s)
        scales_[s] = same_for_warp(update.scales[s] + chunk.begin / kGroup);
    // What is copied of a misaligned piece reaches beyond it at both ends, by less than its size.
    // At the ends of the tensor that could be outside of its memory, so the first piece, and the
    // last if no whole piece follows it, are left to Singles.
    const bool is_shifted = plan.shifted != 0;
    const bool is_last = update.numel - chunk.end < piece_elements();
    const uint32_t margin = is_shifted && is_last ? piece_elements() : 0;
    const auto n = static_cast<uint32_t>(chunk.end - chunk.begin);
    end_ = n > margin ? (n - margin) / piece_elements() / kUnit * kUnit : 0;
    first_ = is_shifted && chunk.begin == 0 && end_ > 0 ? kUnit : 0;
    start_ = first_ + chunk.slice.rank;
    threads_ = chunk.slice.size;
    stride_ = opaque(has_two() ? 2 * threads_ : threads_);
  }

  // A part of the plan, or what is known of the step. If it was not known before, the compiler
  // cannot tell what it is: it would derive all tests from it at once, and hold the results in
  // registers over a loop.
  template <class V>
  static FUSEDOPT_HD V asked_anew(V part) {
    return Kind::kIsUsual ? part : opaque(part);
  }

  FUSEDOPT_HD const StagePlan& plan() const { return plan_; }
  FUSEDOPT_HD Formats formats() const {
    Words<2> words = plan_.formats;
    for (uint32_t& word : words.words) word = opaque(word);
    return formats_of_step<Kind>(bit_cast<Formats>(words));
  }
  FUSEDOPT_HD uint64_t first_pair() const { return first_pair_; }       // of the chunk's draws
  FUSEDOPT_HD char* data(int operand) const { return data_[operand]; }  // at the chunk's start

  // The scale of the group that a piece is in, and how many lanes have a group together.
  FUSEDOPT_HD float* scale_of(int operand, uint32_t piece) const {
    return scales_[operand - kFirstState] + (piece >> plan_.group_shift);
  }
  FUSEDOPT_HD uint32_t lanes_of_group() const { return 1u << plan_.group_shift; }
  FUSEDOPT_HD bool is_first_of_group() const { return (thread_ & (lanes_of_group() - 1)) == 0; }

  FUSEDOPT_HD bool has_two() const { return plan_.has_two != 0; }
  FUSEDOPT_HD uint32_t piece_elements() const { return has_two() ? kCount / 2 : kCount; }
  FUSEDOPT_HD uint32_t piece_bytes(int operand) const {
    return plan_.sizes[operand] * piece_elements();
  }

  // Pieces [first(), end()) of the chunk are staged. A thread takes those from start() on, stride()
  // apart; what is outside goes through Singles.
  FUSEDOPT_HD uint32_t first() const { return first_; }
  FUSEDOPT_HD uint32_t end() const { return end_; }
  FUSEDOPT_HD uint32_t start() const { return start_; }
  FUSEDOPT_HD uint32_t stride() const { return stride_; }
  FUSEDOPT_HD Tile tile(uint32_t at) const {
    return {{at, has_two() && at + threads_ < end_ ? at + threads_ : at}};
  }

  // The stages are a ring buffer: after the last comes the first again.
  FUSEDOPT_HD SharedPlace first_stage() const { return own_; }
  FUSEDOPT_HD SharedPlace after(SharedPlace stage) const {
    const SharedPlace next = stage + plan_.stage_bytes;
    return next == own_ + kStages * plan_.stage_bytes ? own_ : next;
  }

  // Issues the copies of a tile into a stage. A thread's two pieces of 16 bytes lie kNextPiece
  // apart; two smaller ones lie side by side, so that one access of 16 bytes reads both.
  FUSEDOPT_HD void start_copies(const Tile& tile, SharedPlace stage) const {
    copy<16>(plan_.of16, tile.at[0], stage);
    if (has_two()) copy<16>(plan_.of16, tile.at[1], stage + kNextPiece);
    if (plan_.not_of16 == 0) return;
    if (plan_.of8 != 0) {
      copy<8>(plan_.of8, tile.at[0], stage);
      if (has_two()) copy<8>(plan_.of8, tile.at[1], stage + 8);
    }
    if (plan_.of4 != 0) {
      copy<4>(plan_.of4, tile.at[0], stage);
      copy<4>(plan_.of4, tile.at[1], stage + 4);
    }
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if ((plan_.in_parts & only(k)) != 0) copy_parts(k, tile, stage);
    });
    if constexpr (kHasCodes)
      unroll<Rule::kNumStates>([&](auto s) __attribute__((always_inline)) {
        constexpr int kOperand = kFirstState + decltype(s)::value;
        const Formats formats = formats_of_step<Kind>(bit_cast<Formats>(plan_.formats));
        const uint32_t has_it = is_code(formats.dtypes[kOperand]);
        const SharedPlace to = stage + plan_.places[0][kOperand] + 8;
        start_copy_if<4>(has_it, to, scale_of(kOperand, tile.at[0]));
        if (has_two()) start_copy_if<4>(has_it, to + 4, scale_of(kOperand, tile.at[1]));
      });
  }

  // Puts the parts of misaligned pieces together once they have arrived. It is done in shared
  // memory, so that all that reads a stage finds aligned pieces.
  FUSEDOPT_HD void align(SharedPlace stage) const {
    if (plan_.in_parts == 0) return;
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if ((plan_.in_parts & only(k)) != 0 && plan_.sizes[k] <= 2) join_parts(k, stage);
    });
  }

 private:
  // Copies a piece of each of these operands. The copies are predicated and issued in one run,
  // because a GPU has to wait before the first copy after a branch.
  template <int kBytes>
  FUSEDOPT_HD void copy(uint32_t operands, uint32_t at, SharedPlace stage) const {
    const uint32_t wanted = asked_anew(operands), offset = at * kBytes;
    const auto start = [&](auto k) __attribute__((always_inline)) {
      start_copy_if<kBytes>(wanted & only(k), stage + plan_.places[0][k], data_[k] + offset);
    };
    if ((operands & kUncommon) != 0)
      for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
        if (!is_common(k)) start(k);
      });
    for_operands<Rule>([&](auto k) __attribute__((always_inline)) {
      if (is_common(k)) start(k);
    });
  }

  // Copies an operand's misaligned pieces. Elements of 4 and 8 bytes lie at whole words, which are
  // copied one by one. A piece of smaller ones is a part of two aligned pieces side by side: both
  // are copied, the second kNextPiece behind the first.
  FUSEDOPT_HD void copy_parts(int operand, const Tile& tile, SharedPlace stage) const {
    const uint32_t bytes = piece_bytes(operand);
    const SharedPlace to = stage + plan_.places[0][operand];
#pragma unroll 1
    for (uint32_t p = 0; p <= plan_.has_two; ++p) {
      const char* const from = data_[operand] + (p == 0 ? tile.at[0] : tile.at[1]) * bytes;
      const SharedPlace own = to + p * (bytes == 16 ? kNextPiece : bytes);
      if (plan_.sizes[operand] > 2) {
#pragma unroll 1
        for (uint32_t i = 0; i < bytes; i += 4) start_copy_if<4>(1, own + i, from + i);
        continue;
      }
      const char* const aligned = from - shift(operand);
      for (uint32_t second = 0; second < 2; ++second) {
        const SharedPlace part = own + second * kNextPiece;
        start_copy_if<16>(bytes == 16, part, aligned + second * 16);
        start_copy_if<8>(bytes == 8, part, aligned + second * 8);
        start_copy_if<4>(bytes == 4, part, aligned + second * 4);
      }
    }
  }

  // Bytes from the aligned piece in which an operand's data begins to the data itself.
  FUSEDOPT_HD uint32_t shift(int operand) const {
    const auto address = reinterpret_cast<uintptr_t>(data_[operand]);
    return static_cast<uint32_t>(address) & (piece_bytes(operand) - 1);
  }

  FUSEDOPT_HD void join_parts(int operand, SharedPlace stage) const {
    const SharedPlace at = stage + plan_.places[0][operand];
    const uint32_t bytes = piece_bytes(operand), shift = this->shift(operand);
    Words<4> words = load_shared(at);
    const Words<4> seconds = load_shared(at + kNextPiece);
    if (bytes == 16) {
      join<4>(words, seconds, 0, shift);
    } else if (bytes == 8) {
      join<2>(words, seconds, 0, shift);
      if (has_two()) join<2>(words, seconds, 2, shift);  // else scales of codes can lie here
    } else {
      join<1>(words, seconds, 0, shift);
      join<1>(words, seconds, 1, shift);
    }
    store_shared(at, words);
  }

  // The piece that begins `shift` bytes within the words from `first` on, and ends in `seconds`.
  template <int kWords>
  static FUSEDOPT_HD void join(Words<4>& words, const Words<4>& seconds, int first,
                               uint32_t shift) {
    uint32_t both[2 * kWords];
    for (int i = 0; i < kWords; ++i) {
      both[i] = words.words[first + i];
      both[kWords + i] = seconds.words[first + i];
    }
    for (int step = kWords / 2; step > 0; step /= 2)
      for (int i = 0; i + step < 2 * kWords; ++i)
        both[i] = (shift & 4u * static_cast<uint32_t>(step)) != 0 ? both[i + step] : both[i];
    for (int i = 0; i < kWords; ++i)
      words.words[first + i] = word_across(both[i], both[i + 1], shift & 3);
  }

  const StagePlan& plan_;
  const SharedPlace own_;  // this thread's place in the first stage
  const uint32_t thread_;
  const uint64_t first_pair_;
  char* data_[kMaxOperands];         // at the chunk's start
  float* scales_[Rule::kNumStates];  // likewise
  uint32_t first_, end_, start_, threads_, stride_;
};

}  // namespace fusedopt::cuda
