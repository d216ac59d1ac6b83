#pragma once

#include <cstdint>
#include <type_traits>

#include "core/element.h"
#include "core/step.h"
#include "core/stochastic.h"
#include "cuda/access.h"
#include "cuda/lane.h"
#include "cuda/tuning.h"

// Operands of dense works on their way through shared memory. Every thread copies the bytes that it
// needs to a place of its own, some stages ahead, and reads no others: there is nothing to wait for
// but its own copies. A stage holds bytes, whatever the formats, which matter when they are read.
namespace fusedopt::cuda {

// A thread has kThreadElements at a time: in one piece if that makes 16 bytes of every operand,
// else in two, a warp or a block apart, so that neighbours always touch neighbouring bytes. An
// operand is copied in granules of a piece's size at addresses that are multiples of it: one for
// each piece, or the two that a piece lies across where memory is not aligned to pieces.
struct Pieces {
  uint32_t elements;  // of one

  template <class T>
  static FUSEDOPT_HD Pieces of(const Formats& formats) {
    bool is_narrow = sizeof(T) == sizeof(float);
#pragma unroll
    for (int k = 0; k < kMaxOperands; ++k)
      is_narrow = is_narrow && item_size(formats.dtypes[k]) <= 2;
    return {static_cast<uint32_t>(is_narrow ? kThreadElements<T> : kThreadElements<T> / 2)};
  }

  FUSEDOPT_HD uint32_t bytes(DType dtype) const {
    return elements * static_cast<uint32_t>(item_size(dtype));
  }
  // Of an operand's start, from a multiple of a piece's size.
  FUSEDOPT_HD uint32_t shift(const void* data, DType dtype) const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data)) & (bytes(dtype) - 1);
  }
};

// A float32 master is the weight; then the param is only written.
FUSEDOPT_HD bool is_loaded(const Formats& formats, int operand) {
  return formats.has(operand) &&
         (operand != kParam || master_of(formats.dtypes[kMaster]) != Master::kFloat32);
}

template <class Rule>
FUSEDOPT_HD constexpr bool is_in_rule(int operand) {
  return operand < kFirstState + Rule::kNumStates || operand >= kMaster;
}

// What a warp notes in shared memory, where it takes no registers: of an operand,
struct alignas(16) OperandNote {
  char* data;      // of the chunk's first element
  uint32_t place;  // of the warp's granules, in a stage
  uint32_t shift;
};
// of granules to be copied, those of all pieces,
struct alignas(16) GranulesNote {
  const char* data;  // of an element at the chunk's start
  uint32_t place;
  uint16_t item_size;
  uint16_t bytes;  // of one
};
// and elements [begin, end) of a work, for a thread among those that share them.
struct Chunk {
  const Work* work;  // in device memory
  int64_t begin, end;
  Lane lane;
};

// Shared memory that a warp needs for its notes and all stages.
template <class T>
FUSEDOPT_HD uint32_t warp_bytes(const Work& work) {
  const Pieces pieces = Pieces::of<T>(work.formats);
  uint32_t sum = kMaxOperands * sizeof(OperandNote) + sizeof(Chunk);
  for (int k = 0; k < kMaxOperands; ++k) {
    if (!is_loaded(work.formats, k)) continue;
    const DType dtype = work.formats.dtypes[k];
    const uint32_t bytes = kWarp * kThreadElements<T> * static_cast<uint32_t>(item_size(dtype));
    const uint32_t copies = pieces.shift(work.data[k], dtype) != 0 ? 2 : 1;
    sum += copies * (static_cast<uint32_t>(sizeof(GranulesNote)) + kStages * bytes);
  }
  return sum;
}

// Where a thread's elements start, in each piece; the second is the first again where there is only
// one, or room for only one.
struct Tile {
  uint32_t at[2];
};

// A chunk of a dense work as one thread sees it.
template <class Rule, class T>
class Staged {
  static constexpr int kCount = kThreadElements<T>;

 public:
  // All threads of a warp note the same, each for itself.
  FUSEDOPT_HD Staged(const Chunk& chunk, const Work& work, uint32_t thread, SharedPlace shared,
                     uint32_t shared_bytes)
      : pieces_(Pieces::of<T>(work.formats)),
        lanes_(chunk.lane.count),
        warp_lane_(thread % kWarp),
        notes_(shared),
        stage_bytes_(0) {
    bool any_is_shifted = false;
    SharedPlace granules = notes_ + kGranules;
#pragma unroll
    for (int k = 0; k < kMaxOperands; ++k) {
      if (!is_in_rule<Rule>(k) || !work.formats.has(k)) continue;
      const DType dtype = work.formats.dtypes[k];
      const uint32_t shift = pieces_.shift(work.data[k], dtype);
      const OperandNote note = {static_cast<char*>(work.data[k]) + chunk.begin * item_size(dtype),
                                stage_bytes_, shift};
      store_shared(notes_ + k * sizeof(OperandNote), bit_cast<Words<4>>(note));
      if (!is_loaded(work.formats, k)) continue;
      any_is_shifted = any_is_shifted || shift != 0;
      for (uint32_t g = 0; g < (shift != 0 ? 2u : 1u); ++g) {
        const GranulesNote these = {note.data - shift + g * pieces_.bytes(dtype), stage_bytes_,
                                    static_cast<uint16_t>(item_size(dtype)),
                                    static_cast<uint16_t>(pieces_.bytes(dtype))};
        store_shared(granules, bit_cast<Words<4>>(these));
        granules = granules + sizeof(GranulesNote);
        stage_bytes_ += kWarp * kCount * static_cast<uint32_t>(item_size(dtype));
      }
    }
    granules_end_ = granules;
    const auto notes_bytes = static_cast<uint32_t>(granules_end_ - notes_);
    const uint32_t fit = (shared_bytes - notes_bytes) / stage_bytes_;
    const uint32_t stages = fit < kStages ? fit : kStages;
    stages_end_ = first_stage() + stages * stage_bytes_;
    // Granules must not reach beyond an operand's own memory.
    const auto n = static_cast<uint32_t>(chunk.end - chunk.begin);
    const uint32_t margin = any_is_shifted ? pieces_.elements : 0;
    const uint32_t first = chunk.begin == 0 ? margin : 0;
    const int64_t after = work.numel - chunk.end;
    const uint32_t last = after < margin ? margin - static_cast<uint32_t>(after) : 0;
    const uint32_t room = stages > 0 && n > first + last ? n - first - last : 0;
    first_ = first;
    end_ = first + room / pieces_.elements * pieces_.elements;
    start_ = first + chunk.lane.index * pieces_.elements;

    const Chunk of_warp = {
        chunk.work, chunk.begin, chunk.end, {chunk.lane.index - warp_lane_, chunk.lane.count}};
    const auto words = bit_cast<Two>(of_warp);
    store_shared(notes_ + kChunkNote, words.parts[0]);
    store_shared(notes_ + kChunkNote + sizeof(Words<4>), words.parts[1]);
  }

  // As it was noted.
  FUSEDOPT_HD Chunk chunk() const {
    Two words;
    words.parts[0] = load_shared<4>(notes_ + kChunkNote);
    words.parts[1] = load_shared<4>(notes_ + kChunkNote + sizeof(Words<4>));
    const auto of_warp = bit_cast<Chunk>(words);
    return {of_warp.work,
            of_warp.begin,
            of_warp.end,
            {of_warp.lane.index + warp_lane_, of_warp.lane.count}};
  }

  // Elements [first(), end()) are staged, counted from the chunk's start.
  FUSEDOPT_HD uint32_t first() const { return first_; }
  FUSEDOPT_HD uint32_t end() const { return end_; }
  FUSEDOPT_HD uint32_t piece_elements() const { return pieces_.elements; }

  FUSEDOPT_HD uint32_t start() const { return start_; }
  FUSEDOPT_HD uint32_t stride() const { return lanes_ * kCount; }
  FUSEDOPT_HD Tile tile(uint32_t at) const {
    const uint32_t second = at + lanes_ * pieces_.elements;
    const bool has_second = has_two() && second < end_;
    return {{at, has_second ? second : at}};
  }

  // Stages of a thread, in turn.
  FUSEDOPT_HD SharedPlace first_stage() const { return granules_end_; }
  FUSEDOPT_HD SharedPlace after(SharedPlace stage) const {
    const SharedPlace next = stage + stage_bytes_;
    return next == stages_end_ ? first_stage() : next;
  }
  FUSEDOPT_HD bool has_all_stages() const {
    return stages_end_ == first_stage() + kStages * stage_bytes_;
  }

  // Two pieces of 8 bytes, or of 4, lie side by side, so that one access reads both.
  FUSEDOPT_HD void start_copies(const Tile& tile, SharedPlace stage) const {
    const bool has_two = this->has_two();
#pragma unroll 1
    for (SharedPlace note = notes_ + kGranules; note != granules_end_;
         note += sizeof(GranulesNote)) {
      const auto granules = bit_cast<GranulesNote>(load_shared<4>(note));
      const SharedPlace to = stage + warp_lane_ * 16 + granules.place;
      const char* const first = granules.data + uint64_t{tile.at[0]} * granules.item_size;
      const char* const second = granules.data + uint64_t{tile.at[1]} * granules.item_size;
      const bool is_16 = granules.bytes == 16, is_8 = granules.bytes == 8;
      start_copy_if<16>(is_16, to, first);
      start_copy_if<16>(is_16 && has_two, to + kWarp * 16, second);
      start_copy_if<8>(is_8, to, first);
      start_copy_if<8>(is_8, to + 8, second);
      if constexpr (sizeof(T) == sizeof(double)) {
        start_copy_if<4>(!is_16 && !is_8, to - warp_lane_ * 8, first);
        start_copy_if<4>(!is_16 && !is_8, to - warp_lane_ * 8 + 4, second);
      }
    }
  }

  // What Elements asks of memory.
  class Memory {
   public:
    FUSEDOPT_HD Memory(const Staged& staged, const Tile& tile, SharedPlace stage)
        : staged_(staged), tile_(tile), stage_(stage) {}

    template <class Storage>
    FUSEDOPT_HD void load(int operand, T (&to)[kCount]) const {
      uint32_t words[kCount * sizeof(Storage) / 4];
      staged_.read(operand, stage_, words);
      if constexpr (std::is_same_v<Storage, BFloat16>) {
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          to[j] = static_cast<T>(
              as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u));
      } else if constexpr (std::is_same_v<Storage, Float16>) {
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          to[j] = static_cast<T>(float_from_half(
              static_cast<uint16_t>(j % 2 == 0 ? words[j / 2] : words[j / 2] >> 16)));
      } else {
        const auto stored = bit_cast<Stored<Storage>>(words_of(words));
#pragma unroll
        for (int j = 0; j < kCount; ++j) to[j] = fusedopt::load<T>(stored.values[j]);
      }
    }

    template <class Storage>
    FUSEDOPT_HD void store(int operand, const T (&from)[kCount]) const {
      if constexpr (sizeof(Storage) == 2) {
        uint32_t words[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i)
          words[i] = pack<Storage>(to_float(from[2 * i]), to_float(from[2 * i + 1]));
        staged_.write(operand, tile_, words);
      } else {
        Stored<Storage> stored;
#pragma unroll
        for (int j = 0; j < kCount; ++j) fusedopt::store(stored.values[j], from[j]);
        auto words = bit_cast<Words<kCount * sizeof(Storage) / 4>>(stored);
        staged_.write(operand, tile_, words.words);
      }
    }

    FUSEDOPT_HD void store_bfloat16(int operand, const float (&from)[kCount]) const {
      uint32_t words[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i)
        words[i] = word_of(as_bits(from[2 * i]) >> 16, as_bits(from[2 * i + 1]) >> 16);
      staged_.write(operand, tile_, words);
    }

    FUSEDOPT_HD void load_words(int operand, uint32_t (&to)[kCount]) const {
      uint32_t words[kCount / 2];
      staged_.read(operand, stage_, words);
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = j % 2 == 0 ? words[j / 2] : words[j / 2] >> 16;
    }

    FUSEDOPT_HD void store_words(int operand, const uint32_t (&from)[kCount]) const {
      uint32_t words[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) words[i] = word_of(from[2 * i], from[2 * i + 1]);
      staged_.write(operand, tile_, words);
    }

    // Pieces start at even elements.
    FUSEDOPT_HD void find_draws(uint32_t rounding_key, uint32_t (&draws)[kCount]) const {
      constexpr int kHalf = kCount / 2;
      const bool is_one = staged_.pieces_.elements == kCount;
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t at = p == 0 ? tile_.at[0] : is_one ? tile_.at[0] + kHalf : tile_.at[1];
        const auto element = static_cast<uint64_t>(staged_.chunk().begin) + at;
        const uint32_t key = draw_key(rounding_key, element);
        const auto pair = static_cast<uint32_t>(element >> 1);
#pragma unroll
        for (int j = 0; j < kHalf; j += 2) {
          draws[p * kHalf + j] = pair_draw(key, pair + static_cast<uint32_t>(j / 2));
          draws[p * kHalf + j + 1] = second_of_pair(draws[p * kHalf + j]);
        }
      }
    }

   private:
    template <class Storage>
    struct Stored {
      Storage values[kCount];
    };
    template <int kWords>
    static FUSEDOPT_HD Words<kWords> words_of(const uint32_t (&words)[kWords]) {
      Words<kWords> same;
#pragma unroll
      for (int i = 0; i < kWords; ++i) same.words[i] = words[i];
      return same;
    }

    const Staged& staged_;
    const Tile& tile_;
    const SharedPlace stage_;
  };

 private:
  FUSEDOPT_HD bool has_two() const { return pieces_.elements != kCount; }

  FUSEDOPT_HD OperandNote note_of(int operand) const {
    return bit_cast<OperandNote>(load_shared<4>(notes_ + operand * sizeof(OperandNote)));
  }

  struct PlaceAndShift {
    uint32_t place, shift;
  };

  // The bytes of a thread's elements.
  template <int kWords>
  FUSEDOPT_HD void read(int operand, SharedPlace stage, uint32_t (&words)[kWords]) const {
    const auto note =
        bit_cast<PlaceAndShift>(load_shared<2>(notes_ + operand * sizeof(OperandNote) + 8));
    const SharedPlace from = stage + warp_lane_ * (kWords == 2 ? 8 : 16) + note.place;
    read_granules(from, words);
    if (note.shift == 0) return;
    uint32_t next[kWords];
    read_granules(from + kWarp * 4 * kWords, next);
    if constexpr (kWords == 4 && sizeof(T) == sizeof(float))
      if (!has_two()) return move_to_front<4>(next, note.shift, words);
    move_to_front<kWords / 2>(next, note.shift, words);
    move_to_front<kWords / 2>(next + kWords / 2, note.shift, words + kWords / 2);
  }

  template <int kWords>
  static FUSEDOPT_HD void read_granules(SharedPlace from, uint32_t (&to)[kWords]) {
    constexpr int kPart = kWords < 4 ? kWords : 4;
#pragma unroll
    for (int first = 0; first < kWords; first += kPart) {
      const Words<kPart> words = load_shared<kPart>(from + first / kPart * kWarp * 16);
#pragma unroll
      for (int i = 0; i < kPart; ++i) to[first + i] = words.words[i];
    }
  }

  // From byte `shift` on of the granule in `words` and the one after it.
  template <int kWords>
  static FUSEDOPT_HD void move_to_front(const uint32_t* next, uint32_t shift, uint32_t* words) {
    uint32_t all[2 * kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      all[i] = words[i];
      all[kWords + i] = next[i];
    }
#pragma unroll
    for (int by = kWords / 2; by > 0; by /= 2)
#pragma unroll
      for (int i = 0; i < kWords + by; ++i)
        all[i] = (shift & static_cast<uint32_t>(4 * by)) != 0 ? all[i + by] : all[i];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = word_across(all[i], all[i + 1], shift & 3);
  }

  template <int kWords>
  FUSEDOPT_HD void write(int operand, const Tile& tile, const uint32_t (&words)[kWords]) const {
    constexpr int kHalf = kWords / 2, kSize = 4 * kWords / kCount;
    const OperandNote note = note_of(operand);
    char* const first = note.data + uint64_t{tile.at[0]} * kSize;
    char* const second = note.data + uint64_t{tile.at[1]} * kSize;
    if constexpr (kWords == 4 && sizeof(T) == sizeof(float)) {
      const bool is_whole = note.shift == 0;
      store_words_if(is_whole && !has_two(), first, part_of<4>(words));
      store_words_if(is_whole && has_two(), first, part_of<2>(words));
      store_words_if(is_whole && has_two(), second, part_of<2>(words + 2));
      if (is_whole) return;
      if (!has_two()) return write_shifted<4, 2>(note.shift, first, words);
    } else if (note.shift == 0) {
      fusedopt::cuda::store_words(first, part_of<kHalf>(words));
      return fusedopt::cuda::store_words(second, part_of<kHalf>(words + kHalf));
    }
    write_shifted<kHalf, kSize>(note.shift, first, words);
    write_shifted<kHalf, kSize>(note.shift, second, words + kHalf);
  }

  template <int kWords>
  static FUSEDOPT_HD Words<kWords> part_of(const uint32_t* words) {
    Words<kWords> part;
#pragma unroll
    for (int i = 0; i < kWords; ++i) part.words[i] = words[i];
    return part;
  }

  template <int kWords, int kSize>
  static FUSEDOPT_HD void write_shifted(uint32_t shift, char* to, const uint32_t* from) {
    if (kSize >= 4 || shift % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) fusedopt::cuda::store_words(to + 4 * i, Words<1>{{from[i]}});
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i)
        store_item(reinterpret_cast<uint16_t*>(to) + i,
                   static_cast<uint16_t>(i % 2 == 0 ? from[i / 2] : from[i / 2] >> 16));
    }
  }

  static constexpr uint32_t kChunkNote = kMaxOperands * sizeof(OperandNote);
  static constexpr uint32_t kGranules = kChunkNote + sizeof(Chunk);
  struct Two {
    Words<4> parts[2];
  };

  Pieces pieces_;
  uint32_t lanes_, warp_lane_;
  SharedPlace notes_, granules_end_, stages_end_;
  uint32_t stage_bytes_;  // of the warp
  uint32_t first_, end_, start_;
};

}  // namespace fusedopt::cuda
