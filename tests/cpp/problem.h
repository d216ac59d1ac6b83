#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "core/dtypes.h"
#include "core/layout.h"
#include "core/schedule.h"
#include "core/step.h"

// One tensor's update made by hand, what it works on, and what must come out.

inline constexpr int64_t kGuard = 8;  // elements around an operand that must not change

// One operand's memory, of any format. With `guard` 0 the memory ends where the operand does, so
// that ASan sees what is read behind it. `shift` moves the operand by elements, at most `guard`.
class Buffer {
 public:
  Buffer(fusedopt::DType dtype, int64_t elements, std::mt19937& random, int64_t guard = kGuard,
         int64_t shift = 0)
      : dtype_(dtype),
        first_(guard + shift),
        bytes_(static_cast<size_t>((elements + 2 * guard) * fusedopt::item_size(dtype))) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < elements + 2 * guard; ++i) set(i - first_, std::fabs(normal(random)));
  }

  void* data() { return place(0); }
  std::vector<uint8_t>& bytes() { return bytes_; }  // guards included
  fusedopt::DType dtype() const { return dtype_; }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

  template <class T>
  T get(int64_t at) {
    T value = 0;
    fusedopt::with_storage(dtype_, [&](auto storage) {
      std::memcpy(&storage, place(at), sizeof(storage));
      value = fusedopt::load<T>(storage);
    });
    return value;
  }

  template <class T>
  void set(int64_t at, T value) {
    fusedopt::with_storage(dtype_, [&](auto storage) {
      fusedopt::store(storage, value);
      std::memcpy(place(at), &storage, sizeof(storage));
    });
  }

 private:
  uint8_t* place(int64_t at) { return bytes_.data() + (first_ + at) * fusedopt::item_size(dtype_); }

  fusedopt::DType dtype_;
  int64_t first_;
  std::vector<uint8_t> bytes_;
};

struct Problem {
  fusedopt::RuleId rule;
  int variant;
  fusedopt::Hyper hyper;
  fusedopt::Scalars scalars;
  std::vector<fusedopt::DType> dtypes;  // param, grad, states
  fusedopt::Dims dims;                  // empty: dense
  int64_t numel;
  std::vector<int64_t> shifts;  // of the operands; empty: none
  int64_t guard = kGuard;
};

inline constexpr fusedopt::DType kAllDTypes[] = {
    fusedopt::DType::kFloat32, fusedopt::DType::kFloat64, fusedopt::DType::kBFloat16,
    fusedopt::DType::kFloat16};

// One for every variant of every rule.
std::vector<Problem> all_problems();
// One for every variant of this rule; the last one's scalars have every term.
std::vector<Problem> problems_of(fusedopt::RuleId rule);
inline constexpr fusedopt::RuleId kRules[] = {fusedopt::RuleId::kSgd, fusedopt::RuleId::kAdam};

// The same with all operands in one format.
Problem in_format(Problem problem, fusedopt::DType dtype);

// The same with strided operands.
Problem with_dims(Problem problem, const fusedopt::Dims& dims);

// Ways in which operands can lie that are not dense.
const std::vector<fusedopt::Dims>& strided_layouts();

// The scalars of a step of the problem.
fusedopt::Scalars scalars_at(const Problem& problem, fusedopt::Time time, double grad_scale);

std::vector<Buffer> make_buffers(const Problem& problem, uint32_t seed = 4);

// Offset of element number i in operand k.
int64_t offset_of(const Problem& problem, int64_t i, size_t k);

// Applies the rule to each element alone.
void update_one_by_one(const Problem& problem, std::vector<Buffer>& buffers);

// For the CPU, with scalars 0 and, if it is not dense, layout 0.
fusedopt::Work make_work(const Problem& problem, std::vector<Buffer>& buffers);
