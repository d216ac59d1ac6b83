#pragma once

#include <cstdint>
#include <cstring>

#include "core/bits.h"
#include "core/dtypes.h"
#include "core/step.h"
#include "cuda/access.h"
#include "cuda/tuning.h"

// How a thread brings elements into registers and back: several consecutive ones in one access, or
// single ones. A format knows the operands of one work from some element on. What a vector's load
// gives is unpacked later, when all operands have been asked for.
namespace fusedopt::cuda {

using Vector = Words<kVectorBytes / 4>;

template <class Value, int kSize>
struct Values {
  Value values[kSize];
};

FUSEDOPT_HD bool is_aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

// All operands in one storage format.
template <class Storage>
class Uniform {
 public:
  using T = typename Compute<Storage>::Type;
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(Storage));
  static constexpr bool kStrided = false;
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

// Each operand in a format of its own, computed in T. Branches on formats are the same for all
// threads of a warp.
template <class Computed>
class Mixed {
 public:
  using T = Computed;
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr bool kStrided = true;
  static constexpr int kMinBlocks = 4;  // blocks for an SM: without it, nvcc spills for some GPUs

  FUSEDOPT_HD Mixed(const Work& work, int64_t first) {
    for (int k = 0; k < kMaxOperands; ++k) {
      dtypes_[k] = work.dtypes[k];
      data_[k] = static_cast<char*>(work.data[k]) +
                 (k < work.num_operands ? first * item_size(work.dtypes[k]) : 0);
    }
  }

  FUSEDOPT_HD bool is_vectorizable(int operand) const {
    return is_aligned(data_[operand], kVector * item_size(dtypes_[operand]));
  }

  using Unpacked = Values<T, kVector>;

  // Branches on the number of bytes alone, so that no thread waits for one operand before it has
  // asked for the next.
  FUSEDOPT_HD Vector load_vector(int operand, uint32_t at) const {
    const int64_t item = item_size(dtypes_[operand]);
    const char* const from = static_cast<const char*>(data_[operand]) + at * item;
    Vector vector = {};
    if (item * kVector == 16) load_part<4>(from, vector);
    if (item * kVector == 8) load_part<2>(from, vector);
    if (item * kVector == 4) load_part<1>(from, vector);
    return vector;
  }

  FUSEDOPT_HD Vector gather_vector(int operand, uint32_t at) const {
    Vector vector = {};
    with_storage_of(operand, [&](auto format) {
      using Storage = decltype(format);
      Values<Storage, kVector> stored;
      for (int j = 0; j < kVector; ++j)
        stored.values[j] = load_item(static_cast<const Storage*>(data_[operand]) + at + j);
      memcpy(&vector, &stored, sizeof(stored));
    });
    return vector;
  }

  FUSEDOPT_HD Unpacked unpack(int operand, const Vector& vector) const {
    Unpacked values = {};
    with_storage_of(operand, [&](auto format) {
      Values<decltype(format), kVector> stored;
      memcpy(&stored, &vector, sizeof(stored));
      for (int j = 0; j < kVector; ++j) values.values[j] = load<T>(stored.values[j]);
    });
    return values;
  }

  FUSEDOPT_HD void store_vector(int operand, uint32_t at, const Unpacked& values) const {
    Vector vector = {};
    with_storage_of(operand, [&](auto format) {
      Values<decltype(format), kVector> stored;
      for (int j = 0; j < kVector; ++j) store(stored.values[j], values.values[j]);
      memcpy(&vector, &stored, sizeof(stored));
    });
    const int64_t item = item_size(dtypes_[operand]);
    char* const to = static_cast<char*>(data_[operand]) + at * item;
    if (item * kVector == 16) store_part<4>(vector, to);
    if (item * kVector == 8) store_part<2>(vector, to);
    if (item * kVector == 4) store_part<1>(vector, to);
  }

  FUSEDOPT_HD T load_one(int operand, int64_t at) const {
    T value = 0;
    with_storage_of(operand, [&](auto format) {
      value = load<T>(load_item(static_cast<const decltype(format)*>(data_[operand]) + at));
    });
    return value;
  }

  FUSEDOPT_HD void store_one(int operand, int64_t at, T value) const {
    with_storage_of(operand, [&](auto format) {
      decltype(format) stored;
      store(stored, value);
      store_item(static_cast<decltype(format)*>(data_[operand]) + at, stored);
    });
  }

 private:
  template <int kWords>
  static FUSEDOPT_HD void load_part(const char* from, Vector& vector) {
    const Words<kWords> part = load_words<kWords>(from);
    for (int j = 0; j < kWords; ++j) vector.words[j] = part.words[j];
  }

  template <int kWords>
  static FUSEDOPT_HD void store_part(const Vector& vector, char* to) {
    Words<kWords> part;
    for (int j = 0; j < kWords; ++j) part.words[j] = vector.words[j];
    store_words(to, part);
  }

  // float64 does not take part where float is computed with, nor does code for it.
  template <class F>
  FUSEDOPT_HD void with_storage_of(int operand, const F& f) const {
    const DType dtype = dtypes_[operand];
    if (dtype == DType::kFloat32) return f(float{});
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    if (dtype == DType::kFloat16) return f(Float16{});
    if constexpr (sizeof(T) == sizeof(double)) f(double{});
  }

  void* data_[kMaxOperands];
  DType dtypes_[kMaxOperands];
};

}  // namespace fusedopt::cuda
