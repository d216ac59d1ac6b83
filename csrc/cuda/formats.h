#pragma once

#include <cstdint>
#include <cstring>

#include "core/bits.h"
#include "core/dtypes.h"
#include "core/step.h"
#include "cuda/access.h"
#include "cuda/tuning.h"

// How a thread brings elements of operands in one format into registers and back: several
// consecutive ones in one access, or single ones. A format knows the operands of one work from some
// element on. What a vector's load gives is unpacked later, when all operands have been asked for.
namespace fusedopt::cuda {

using Vector = Words<kVectorBytes / 4>;

template <class Value, int kSize>
struct Values {
  Value values[kSize];
};

FUSEDOPT_HD bool is_aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

// A work in a few accesses, all asked for at once.
FUSEDOPT_HD Work load_work(const Work* from) {
  constexpr int kParts = sizeof(Work) / sizeof(Words<4>);
  struct {
    Words<4> parts[kParts];
  } work;
  for (int i = 0; i < kParts; ++i)
    work.parts[i] = load_words<4>(reinterpret_cast<const Words<4>*>(from) + i);
  return bit_cast<Work>(work);
}

// All operands in one storage format.
template <class Storage>
class Uniform {
 public:
  using T = typename Compute<Storage>::Type;
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(Storage));
  static constexpr bool kIsMixed = false;
  static constexpr int kMinBlocks = 1;  // no bound: the compiler finds the right registers itself

  FUSEDOPT_HD Uniform(const Work& work, int64_t first) {
    for (int k = 0; k < kMaxOperands; ++k)
      data_[k] = static_cast<Storage*>(work.data[k]) + (k < work.num_operands ? first : 0);
  }

  FUSEDOPT_HD bool is_vectorizable(int operand) const {
    return is_aligned(data_[operand], kVectorBytes);
  }

  using Unpacked = Values<Storage, kVector>;

  FUSEDOPT_HD Vector load_vector(int operand, uint32_t at) const {
    return load_words<kVectorBytes / 4>(data_[operand] + at);
  }

  // As load_vector() at any alignment, element by element.
  FUSEDOPT_HD Vector gather_vector(int operand, uint32_t at) const {
    Unpacked values;
    for (int j = 0; j < kVector; ++j) values.values[j] = load_item(data_[operand] + at + j);
    return bit_cast<Vector>(values);
  }

  FUSEDOPT_HD Unpacked unpack(int, const Vector& vector) const {
    return bit_cast<Unpacked>(vector);
  }

  FUSEDOPT_HD void store_vector(int operand, uint32_t at, const Unpacked& values) const {
    store_words(data_[operand] + at, bit_cast<Vector>(values));
  }

  FUSEDOPT_HD T load_one(int operand, int64_t at) const {
    return load<T>(load_item(data_[operand] + at));
  }

  FUSEDOPT_HD void store_one(int operand, int64_t at, T value) const {
    Storage stored;
    store(stored, value);
    store_item(data_[operand] + at, stored);
  }

 private:
  Storage* data_[kMaxOperands];
};

}  // namespace fusedopt::cuda
