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
#include "core/step_scalars.h"
#include "core/step.h"

// One tensor's update made by hand, what it works on, and what must come out.

inline constexpr int64_t kGuard = 8;  // elements around an operand that must not change

// One operand's memory, of any format, none for one that is absent. With `guard` 0 the memory ends
// where the operand does, so that ASan sees what is read behind it. `shift` moves the operand by
// elements, at most `guard`.
class Buffer {
 public:
  Buffer(fusedopt::DType dtype, int64_t elements, std::mt19937& random, int64_t guard = kGuard,
         int64_t shift = 0)
      : dtype_(dtype),
        first_(guard + shift),
        bytes_(static_cast<size_t>((elements + 2 * guard) * fusedopt::item_size(dtype))) {
    std::normal_distribution<double> normal;
    for (int64_t i = -first_; i < elements + 2 * guard - first_; ++i) {
      if (dtype == fusedopt::DType::kRemainder)
        set_word(i, static_cast<uint16_t>(random()));
      else
        set(i, std::fabs(normal(random)));
    }
  }

  void* data() { return dtype_ == fusedopt::DType::kAbsent ? nullptr : place(0); }
  std::vector<uint8_t>& bytes() { return bytes_; }  // guards included
  fusedopt::DType dtype() const { return dtype_; }

  // Of a NaN, the payload does not count.
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

  // 16 bits, whatever they mean.
  uint16_t word(int64_t at) const {
    uint16_t word;
    std::memcpy(&word, place(at), sizeof(word));
    return word;
  }
  void set_word(int64_t at, uint16_t word) { std::memcpy(place(at), &word, sizeof(word)); }

 private:
  const uint8_t* place(int64_t at) const {
    return bytes_.data() + (first_ + at) * fusedopt::item_size(dtype_);
  }
  uint8_t* place(int64_t at) { return const_cast<uint8_t*>(std::as_const(*this).place(at)); }

  fusedopt::DType dtype_;
  int64_t first_;
  std::vector<uint8_t> bytes_;
};

// Dtypes and shifts stand in the operands' places (core/layout.h).
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
  int64_t first_number = 0;  // of the first element in its tensor

  bool has(int operand) const {
    return dtypes[static_cast<size_t>(operand)] != fusedopt::DType::kAbsent;
  }
};

inline constexpr fusedopt::DType kAllDTypes[] = {
    fusedopt::DType::kFloat32, fusedopt::DType::kFloat64, fusedopt::DType::kBFloat16,
    fusedopt::DType::kFloat16};

// One for every variant of every rule, without masters, averages and stochastic rounding.
std::vector<Problem> all_problems();
// One for every variant of this rule, by their numbers; the last one's scalars have every term.
std::vector<Problem> problems_of(fusedopt::RuleId rule);

// Calls `f` with the id of every rule.
template <class F>
void for_each_rule(const F& f) {
  for (int rule = 0; rule < fusedopt::Rules::kSize; ++rule) f(static_cast<fusedopt::RuleId>(rule));
}

// The same with param, grad and the states that there are in one format.
Problem in_format(Problem problem, fusedopt::DType dtype);

// The same with each operand in a format of its own, perhaps a master weight, an average and
// stochastic rounding of what may have it.
Problem in_any_formats(Problem problem, std::mt19937& random);

// The same with the operands a bit each that can be, rounded stochastically.
Problem rounded_stochastically(Problem problem, unsigned operands);

// The same with strided operands.
Problem with_dims(Problem problem, const fusedopt::Dims& dims);

// Ways in which operands can lie that are not dense.
const std::vector<fusedopt::Dims>& strided_layouts();

// The scalars of a step of the problem.
fusedopt::Scalars scalars_at(const Problem& problem, fusedopt::StepInfo info, double grad_scale);

// A buffer for each place.
std::vector<Buffer> make_buffers(const Problem& problem, uint32_t seed = 4);

// Replaces one number of so many by zeros, subnormals, infinities, NaN or numbers near the ends of
// the formats.
void put_special_values(const Problem& problem, std::vector<Buffer>& buffers, uint32_t among,
                        std::mt19937& random);

// Offset of element number i in an operand; its number in the tensor for kIndex.
int64_t offset_of(const Problem& problem, int64_t i, int operand);

// What a step does, as core/element.h says it, for each element alone.
void update_one_by_one(const Problem& problem, std::vector<Buffer>& buffers);

// For the CPU, with scalars 0 and, if it is not dense, layout 0.
fusedopt::ParamUpdate make_update(const Problem& problem, std::vector<Buffer>& buffers);
