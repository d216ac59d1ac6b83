// A problem: one tensor's update made by hand. What it works on, and what must come out, computed
// for each element alone.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "core/dtypes.h"
#include "core/layout.h"
#include "core/step.h"
#include "core/step_scalars.h"
#include "core/weight.h"

inline constexpr int64_t kGuard = 8;  // elements around an operand that must not change

// The memory of one operand in any format; none if the operand is absent. With a guard of 0 the
// memory ends where the operand does, so that ASan sees a read behind it. `shift` moves the operand
// by so many elements, at most `guard`.
class Buffer {
 public:
  Buffer(fusedopt::DType dtype, int64_t elements, std::mt19937& random, int64_t guard = kGuard,
         int64_t shift = 0)
      : dtype_(dtype),
        first_(guard + shift),
        bytes_(static_cast<size_t>((elements + 2 * guard) * fusedopt::item_size(dtype))) {
    std::normal_distribution<double> normal;
    for (int64_t i = -first_; i < elements + 2 * guard - first_; ++i) {
      if (is_remainder())
        set_word(i, static_cast<uint16_t>(random()));
      else
        set(i, std::fabs(normal(random)));
    }
  }

  void* data() { return dtype_ == fusedopt::DType::kAbsent ? nullptr : place(0); }
  std::vector<uint8_t>& bytes() { return bytes_; }  // guards included
  fusedopt::DType dtype() const { return dtype_; }
  bool is_remainder() const { return is_split(fusedopt::master_of(dtype_)); }

  // Two NaNs are equal, whatever their payloads.
  bool operator==(const Buffer& other) const;

  template <class T>
  T get(int64_t at) const {
    T value = 0;
    fusedopt::with_storage<T>(dtype_, [&](auto storage) {
      std::memcpy(&storage, place(at), sizeof(storage));
      value = fusedopt::load<T>(storage);
    });
    return value;
  }

  // Does nothing if the operand is absent.
  template <class T>
  void set(int64_t at, T value) {
    if (dtype_ == fusedopt::DType::kAbsent) return;
    fusedopt::with_storage<double>(dtype_, [&](auto storage) {
      fusedopt::store(storage, value);
      std::memcpy(place(at), &storage, sizeof(storage));
    });
  }

  // The bits of an element of up to 16, whatever they mean.
  uint16_t word(int64_t at) const {
    uint16_t word = 0;
    std::memcpy(&word, place(at), word_size());
    return word;
  }
  void set_word(int64_t at, uint16_t word) { std::memcpy(place(at), &word, word_size()); }

 private:
  size_t word_size() const { return static_cast<size_t>(fusedopt::item_size(dtype_)); }
  const uint8_t* place(int64_t at) const {
    return bytes_.data() + (first_ + at) * fusedopt::item_size(dtype_);
  }
  uint8_t* place(int64_t at) { return const_cast<uint8_t*>(std::as_const(*this).place(at)); }

  fusedopt::DType dtype_;
  int64_t first_;
  std::vector<uint8_t> bytes_;
};

// Dtypes and shifts are indexed by operand (core/layout.h).
struct Problem {
  fusedopt::RuleId rule;
  int variant;
  fusedopt::HyperParams hyper;
  fusedopt::Scalars scalars;
  std::array<fusedopt::DType, fusedopt::kMaxOperands> dtypes;
  unsigned stochastic;  // a bit for each operand that is rounded stochastically
  fusedopt::Dims dims;  // empty: dense
  int64_t numel;
  std::array<int64_t, fusedopt::kMaxOperands> shifts;
  int64_t guard = kGuard;
  int64_t first_number = 0;  // number in its tensor of the first element

  bool has(int operand) const {
    return dtypes[static_cast<size_t>(operand)] != fusedopt::DType::kAbsent;
  }
};

inline constexpr fusedopt::DType kAllDTypes[] = {
    fusedopt::DType::kFloat32, fusedopt::DType::kFloat64, fusedopt::DType::kBFloat16,
    fusedopt::DType::kFloat16};

// Problems are of as many kinds as there are rules, those that share a kernel counted one by one.
// The kind of a rule with a kernel of its own is its id.
template <class Rule>
inline constexpr int kKindOf = fusedopt::kIdOf<Rule> + fusedopt::kMemberOf<Rule>;
inline constexpr int kNumKinds =
    fusedopt::kIdOf<fusedopt::OtherRules> + fusedopt::OtherRules::Members::kSize;
static_assert(fusedopt::kIdOf<fusedopt::OtherRules> == fusedopt::Rules::kSize - 1);
inline int kind_of(const Problem& problem) { return problem.rule + problem.hyper.member; }

// Problems without master weight, average and stochastic rounding: one for every variant of a kind,
// in the order of their numbers. The scalars of the last have every term.
const std::vector<Problem>& problems_of(int kind);
// Those of all kinds.
const std::vector<Problem>& all_problems();
// Enough where it takes time: all of the rules with a kernel of their own, the last of each other.
const std::vector<Problem>& main_problems();

// The problem with param, grad and its states in one format.
Problem in_format(Problem problem, fusedopt::DType dtype);

// The problem with each operand in any format and, at random, a master weight, an average, and
// stochastic rounding of operands that may have it.
Problem in_any_formats(Problem problem, std::mt19937& random);

// The problem with stochastic rounding of those of these operands that may have it.
Problem rounded_stochastically(Problem problem, unsigned operands);

// The problem with strided operands.
Problem with_dims(Problem problem, const fusedopt::Dims& dims);

// Several strided layouts.
const std::vector<fusedopt::Dims>& strided_layouts();

// The scalars of a step of the problem.
fusedopt::Scalars scalars_at(const Problem& problem, fusedopt::StepInfo info, double grad_scale);

// A buffer for each operand.
std::vector<Buffer> make_buffers(const Problem& problem, uint32_t seed = 4);

// Replaces one number in so many by a zero, a subnormal number, an infinity, a NaN or a number near
// the ends of the formats.
void put_special_values(const Problem& problem, std::vector<Buffer>& buffers, uint32_t among,
                        std::mt19937& random);

// Offset of element number i in an operand; for kIndex, its number in the tensor.
int64_t offset_of(const Problem& problem, int64_t i, int operand);

// The step as core/element.h describes it, for each element alone: what drivers must give.
void update_one_by_one(const Problem& problem, std::vector<Buffer>& buffers);

// The update for the CPU driver, with index 0 of scalars and, if it is strided, of layouts.
fusedopt::ParamUpdate make_update(const Problem& problem, std::vector<Buffer>& buffers);
