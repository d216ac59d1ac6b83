// As many numbers as a register of the instruction set holds, with the operators and functions of
// numbers (core/lanes.h), and the conversions between registers and storage formats. Part of
// isa_kernels.h, which says what must not be used here.
#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/lanes.h"
#include "core/macros.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedopt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

constexpr int64_t kCacheLine = 64;

// Whether fma() is an instruction, and not a function of the C library for each number.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// The vectors of GCC and Clang. Their element type must not depend on a template, so each type has
// a specialization.
template <class T, int kLanes>
struct RawVec;
template <int kLanes>
struct RawVec<float, kLanes> {
  typedef float Type __attribute__((vector_size(kLanes * 4)));
};
template <int kLanes>
struct RawVec<double, kLanes> {
  typedef double Type __attribute__((vector_size(kLanes * 8)));
};
template <int kLanes>
struct RawVec<uint32_t, kLanes> {
  typedef uint32_t Type __attribute__((vector_size(kLanes * 4)));
};
template <int kLanes>
struct RawVec<uint64_t, kLanes> {
  typedef uint64_t Type __attribute__((vector_size(kLanes * 8)));
};
template <int kLanes>
struct RawVec<uint16_t, kLanes> {
  typedef uint16_t Type __attribute__((vector_size(kLanes * 2)));
};
template <int kLanes>
struct RawVec<uint8_t, kLanes> {
  typedef uint8_t Type __attribute__((vector_size(kLanes)));
};

// A register of numbers. Intrinsics stand where the compiler finds no vector instruction by itself.
template <class T, int kLanes>
struct Vec {
  using Raw = typename RawVec<T, kLanes>::Type;
  using Mask = decltype(Raw{} < Raw{});
  using Bits = Vec<uint32_t, kLanes>;

  Raw raw;

  Vec() = default;
  FUSEDOPT_HD Vec(Raw values) : raw(values) {}
  FUSEDOPT_HD Vec(T value) : raw(value - Raw{}) {}  // in all lanes; -0.0 - 0.0 keeps its sign

  FUSEDOPT_HD friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  FUSEDOPT_HD friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  FUSEDOPT_HD friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  FUSEDOPT_HD friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  FUSEDOPT_HD friend Vec operator&(Vec a, Vec b) { return a.raw & b.raw; }
  FUSEDOPT_HD friend Vec operator|(Vec a, Vec b) { return a.raw | b.raw; }
  FUSEDOPT_HD friend Vec operator^(Vec a, Vec b) { return a.raw ^ b.raw; }
  FUSEDOPT_HD friend Vec operator<<(Vec a, int n) { return a.raw << n; }
  FUSEDOPT_HD friend Vec operator>>(Vec a, int n) { return a.raw >> n; }
  FUSEDOPT_HD friend Mask operator<(Vec a, Vec b) { return a.raw < b.raw; }
  FUSEDOPT_HD friend Mask operator>(Vec a, Vec b) { return a.raw > b.raw; }
  FUSEDOPT_HD friend Mask operator==(Vec a, Vec b) { return a.raw == b.raw; }
  FUSEDOPT_HD friend Mask operator!=(Vec a, Vec b) { return a.raw != b.raw; }

  FUSEDOPT_HD friend Vec select(Mask mask, Vec then, Vec otherwise) {
    return mask ? then.raw : otherwise.raw;
  }

  FUSEDOPT_HD friend Vec larger(Vec a, Vec b) { return a.raw > b.raw ? a.raw : b.raw; }
  FUSEDOPT_HD friend Vec smaller(Vec a, Vec b) { return a.raw < b.raw ? a.raw : b.raw; }

  FUSEDOPT_HD friend Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Raw) == 64 && sizeof(T) == 4)
      return Raw(_mm512_fmadd_ps(__m512(a.raw), __m512(b.raw), __m512(c.raw)));
    if constexpr (sizeof(Raw) == 64 && sizeof(T) == 8)
      return Raw(_mm512_fmadd_pd(__m512d(a.raw), __m512d(b.raw), __m512d(c.raw)));
#elif defined(__FMA__)
    if constexpr (sizeof(Raw) == 32 && sizeof(T) == 4)
      return Raw(_mm256_fmadd_ps(__m256(a.raw), __m256(b.raw), __m256(c.raw)));
    if constexpr (sizeof(Raw) == 32 && sizeof(T) == 8)
      return Raw(_mm256_fmadd_pd(__m256d(a.raw), __m256d(b.raw), __m256d(c.raw)));
#endif
    for (int i = 0; i < kLanes; ++i) c.raw[i] = fusedopt::fma(a.raw[i], b.raw[i], c.raw[i]);
    return c;
  }

  FUSEDOPT_HD friend Vec square_root(Vec x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Raw) == 64 && sizeof(T) == 4)
      return Raw(_mm512_maskz_sqrt_ps(0xffff, __m512(x.raw)));
    if constexpr (sizeof(Raw) == 64 && sizeof(T) == 8)
      return Raw(_mm512_maskz_sqrt_pd(0xff, __m512d(x.raw)));
#elif defined(__AVX2__)
    if constexpr (sizeof(Raw) == 32 && sizeof(T) == 4) return Raw(_mm256_sqrt_ps(__m256(x.raw)));
    if constexpr (sizeof(Raw) == 32 && sizeof(T) == 8) return Raw(_mm256_sqrt_pd(__m256d(x.raw)));
#endif
    for (int i = 0; i < kLanes; ++i) x.raw[i] = fusedopt::square_root(x.raw[i]);
    return x;
  }
};

template <int kLanes>
FUSEDOPT_HD Vec<uint32_t, kLanes> as_bits(Vec<float, kLanes> value) {
  return typename Vec<uint32_t, kLanes>::Raw(value.raw);
}
template <int kLanes>
FUSEDOPT_HD Vec<uint64_t, kLanes> as_bits(Vec<double, kLanes> value) {
  return typename Vec<uint64_t, kLanes>::Raw(value.raw);
}
template <int kLanes>
FUSEDOPT_HD Vec<float, kLanes> as_float(Vec<uint32_t, kLanes> bits) {
  return typename Vec<float, kLanes>::Raw(bits.raw);
}

template <int kLanes>
FUSEDOPT_HD Vec<float, kLanes> magnitude(Vec<float, kLanes> x) {
  return as_float(as_bits(x) & 0x7fffffffu);
}

template <class T, int kLanes>
FUSEDOPT_HD Vec<float, kLanes> to_float(Vec<T, kLanes> value) {
  return __builtin_convertvector(value.raw, typename Vec<float, kLanes>::Raw);
}
template <class V, int kLanes>
FUSEDOPT_HD V from_float(Vec<float, kLanes> value) {
  return __builtin_convertvector(value.raw, typename V::Raw);
}

// Whether a comparison is true in any lane.
template <class Mask>
FUSEDOPT_HD bool any(Mask mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Mask) == 64)
    return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(Mask) == 32) return _mm256_movemask_epi8(__m256i(mask)) != 0;
#endif
  bool found = false;
  for (unsigned i = 0; i < sizeof(Mask) / sizeof(mask[0]); ++i) found = found || mask[i] != 0;
  return found;
}

// Unaligned loads and stores of a register.
template <class Raw>
FUSEDOPT_HD Raw read(const void* from) {
  Raw raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return raw;
}
template <class Raw>
FUSEDOPT_HD void write(void* to, Raw raw) {
  __builtin_memcpy(to, &raw, sizeof(raw));
}

// Between 16-bit numbers in memory and the lower halves of words in a register.
template <int kLanes>
FUSEDOPT_HD Vec<uint32_t, kLanes> read_halves(const void* from) {
  using Raw = typename RawVec<uint32_t, kLanes>::Type;
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return Raw(_mm512_cvtepu16_epi32(read<__m256i>(from)));
#elif defined(__AVX2__)
  if constexpr (kLanes == 8) return Raw(_mm256_cvtepu16_epi32(read<__m128i>(from)));
#endif
  return __builtin_convertvector(read<typename RawVec<uint16_t, kLanes>::Type>(from), Raw);
}
template <int kLanes>
FUSEDOPT_HD void write_halves(void* to, Vec<uint32_t, kLanes> words) {
  write(to, __builtin_convertvector(words.raw, typename RawVec<uint16_t, kLanes>::Type));
}

// Bytes as words of 16 bits; and as signed numbers in 32 bits.
template <int kLanes>
FUSEDOPT_HD Vec<uint16_t, kLanes> read_bytes_as_halves(const void* from) {
  using Raw = typename RawVec<uint16_t, kLanes>::Type;
#if defined(__AVX512F__)
  if constexpr (kLanes == 32)
    return Raw(_mm512_maskz_cvtepu8_epi16(0xffffffff, read<__m256i>(from)));
#elif defined(__AVX2__)
  if constexpr (kLanes == 16) return Raw(_mm256_cvtepu8_epi16(read<__m128i>(from)));
#endif
  return __builtin_convertvector(read<typename RawVec<uint8_t, kLanes>::Type>(from), Raw);
}
template <int kLanes>
FUSEDOPT_HD Vec<uint32_t, kLanes> read_signed_bytes(const void* from) {
  using Raw = typename RawVec<uint32_t, kLanes>::Type;
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return Raw(_mm512_maskz_cvtepi8_epi32(0xffff, read<__m128i>(from)));
#elif defined(__AVX2__)
  if constexpr (kLanes == 8)
    return Raw(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<long long>(from))));
#endif
  const Vec<uint32_t, kLanes> bytes =
      __builtin_convertvector(read<typename RawVec<uint8_t, kLanes>::Type>(from), Raw);
  return (bytes ^ 0x80u) - 0x80u;
}

// Loads two registers of numbers from what is stored as `Storage`, and stores them.
template <class V, class Storage>
struct Stored;

template <class T, int kLanes>
struct Stored<Vec<T, kLanes>, float> {
  using V = Vec<T, kLanes>;
  using Raw = typename RawVec<float, kLanes>::Type;
  FUSEDOPT_HD static void load(const char* from, V (&to)[2]) {
    to[0] = __builtin_convertvector(read<Raw>(from), typename V::Raw);
    to[1] = __builtin_convertvector(read<Raw>(from + sizeof(Raw)), typename V::Raw);
  }
  FUSEDOPT_HD static void store(char* to, const V (&from)[2]) {
    write(to, __builtin_convertvector(from[0].raw, Raw));
    write(to + sizeof(Raw), __builtin_convertvector(from[1].raw, Raw));
  }
};

template <int kLanes>
struct Stored<Vec<double, kLanes>, double> {
  using V = Vec<double, kLanes>;
  FUSEDOPT_HD static void load(const char* from, V (&to)[2]) {
    to[0] = read<typename V::Raw>(from);
    to[1] = read<typename V::Raw>(from + sizeof(V));
  }
  FUSEDOPT_HD static void store(char* to, const V (&from)[2]) {
    write(to, from[0].raw);
    write(to + sizeof(V), from[1].raw);
  }
};

#if defined(__AVX512F__)
// The upper or the lower halves of the words of two registers, packed in one.
FUSEDOPT_HD __m512i halves_of(Vec<uint32_t, 16> low, Vec<uint32_t, 16> high, uint16_t is_upper) {
  const RawVec<uint16_t, 32>::Type lower = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                            22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                            44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  return _mm512_permutex2var_epi16(__m512i(low.raw), __m512i(lower + is_upper), __m512i(high.raw));
}
#endif

// Stores the lowest byte of each word.
template <int kLanes>
FUSEDOPT_HD void write_bytes(void* to, Vec<uint32_t, kLanes> words) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16)
    return write(to, _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(words.raw)));
#elif defined(__AVX2__)
  if constexpr (kLanes == 8) {
    // The lowest byte of each word to the front of its half, and the halves' fronts together.
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);
    const __m256i fronts = _mm256_shuffle_epi8(__m256i(words.raw), lowest);
    const __m128i upper = _mm256_extracti128_si256(fronts, 1);
    return write(to, _mm_unpacklo_epi32(_mm256_castsi256_si128(fronts), upper)[0]);
  }
#endif
  write(to, __builtin_convertvector(words.raw, typename RawVec<uint8_t, kLanes>::Type));
}

// Stores the uppermost byte of each word of some registers.
template <int kLanes, int kRegisters>
FUSEDOPT_HD void write_upper_bytes(char* to, const Vec<uint32_t, kLanes> (&words)[kRegisters]) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16 && kRegisters == 4) {
    const __m512i low = _mm512_srli_epi16(halves_of(words[0], words[1], 1), 8);
    const __m512i high = _mm512_srli_epi16(halves_of(words[2], words[3], 1), 8);
    const RawVec<uint64_t, 8>::Type in_order = {0, 2, 4, 6, 1, 3, 5, 7};
    const __m512i packed = _mm512_packus_epi16(low, high);
    return write(to, _mm512_permutexvar_epi64(__m512i(in_order), packed));
  }
#endif
  for (int j = 0; j < kRegisters; ++j) write_bytes(to + j * kLanes, words[j] >> 24);
}

// Of two registers: the first word of each, then the second of each, and so on.
template <int kLanes>
FUSEDOPT_HD void interleave(Vec<uint32_t, kLanes> (&words)[2]) {
  using Raw = typename RawVec<uint32_t, kLanes>::Type;
  const Raw even = words[0].raw, odd = words[1].raw;
  unroll<2>([&](auto j) __attribute__((always_inline)) {
#if defined(__clang__)
    for (int i = 0; i < kLanes; ++i)
      words[j].raw[i] = (i % 2 == 0 ? even : odd)[(j * kLanes + i) / 2];
#else
    Raw from;
    for (int i = 0; i < kLanes; ++i)
      from[i] = static_cast<uint32_t>((j * kLanes + i) / 2 + i % 2 * kLanes);
    words[j] = __builtin_shuffle(even, odd, from);
#endif
  });
}

// Two registers of words whose upper halves are those of one register, and the lower ones 0.
template <int kLanes>
FUSEDOPT_HD void as_upper_halves(Vec<uint16_t, 2 * kLanes> halves, Vec<uint32_t, kLanes> (&to)[2]) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    RawVec<uint16_t, 32>::Type from;
    for (int i = 0; i < 32; ++i) from[i] = static_cast<uint16_t>(i / 2);
    unroll<2>([&](auto j) __attribute__((always_inline)) {
      to[j] = typename Vec<uint32_t, kLanes>::Raw(_mm512_maskz_permutexvar_epi16(
          0xaaaaaaaa, __m512i(from + uint16_t{16} * j), __m512i(halves.raw)));
    });
    return;
  }
#endif
  alignas(64) uint16_t kept[2 * kLanes];
  write(kept, halves.raw);
  for (int j = 0; j < 2; ++j) to[j] = read_halves<kLanes>(kept + j * kLanes) << 16;
}

// Loads and stores the lower halves of words.
struct Halves {
  template <int kLanes>
  FUSEDOPT_HD static void load(const char* from, Vec<uint32_t, kLanes> (&to)[2]) {
    to[0] = read_halves<kLanes>(from);
    to[1] = read_halves<kLanes>(from + 2 * kLanes);
  }
  template <int kLanes>
  FUSEDOPT_HD static void store(char* to, const Vec<uint32_t, kLanes> (&from)[2]) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return write(to, halves_of(from[0], from[1], 0));
#endif
    write_halves(to, from[0]);
    write_halves(to + 2 * kLanes, from[1]);
  }
};

// Stores the upper halves of the words of two registers, which are bfloat16 numbers.
template <int kLanes>
FUSEDOPT_HD void store_upper_halves(char* to, Vec<uint32_t, kLanes> low,
                                    Vec<uint32_t, kLanes> high) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return write(to, halves_of(low, high, 1));
#elif defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i packed = _mm256_packus_epi32(__m256i((low >> 16).raw), __m256i((high >> 16).raw));
    return write(to, _mm256_permute4x64_epi64(packed, 0xd8));
  }
#endif
  Halves::store<kLanes>(to, {low >> 16, high >> 16});
}

// The nearest bfloat16 numbers, ties to even, of the floats at even and at odd places, side by side
// in words. The lower half of a NaN must be 0, as it is if all operands are bfloat16: it is then
// cut off and the NaN stays the same.
template <int kLanes>
FUSEDOPT_HD Vec<uint16_t, 2 * kLanes> bfloat16_nearest(Vec<uint32_t, kLanes> even,
                                                       Vec<uint32_t, kLanes> odd) {
  using Half = Vec<uint16_t, 2 * kLanes>;
  using Raw = typename Half::Raw;
  const Half upper = Raw(((even >> 16) | (odd & 0xffff0000u)).raw);
  const Half lower = Raw(((even & 0xffffu) | (odd << 16)).raw);
  const Half largest_down = 0x7fff + (~upper.raw & 1);
  return select(lower > largest_down, upper + Half(1), upper);
}

template <class T, int kLanes>
struct Stored<Vec<T, kLanes>, BFloat16> {
  using V = Vec<T, kLanes>;
  FUSEDOPT_HD static void load(const char* from, V (&to)[2]) {
    to[0] = from_float<V>(as_float(read_halves<kLanes>(from) << 16));
    to[1] = from_float<V>(as_float(read_halves<kLanes>(from + 2 * kLanes) << 16));
  }
  FUSEDOPT_HD static void store(char* to, const V (&from)[2]) {
    store_upper_halves(to, rounded_to_bfloat16(to_float(from[0])),
                       rounded_to_bfloat16(to_float(from[1])));
  }
};

template <class T, int kLanes>
struct Stored<Vec<T, kLanes>, Float16> {
  using V = Vec<T, kLanes>;
  FUSEDOPT_HD static void load(const char* from, V (&to)[2]) {
    to[0] = load_one(from);
    to[1] = load_one(from + 2 * kLanes);
  }
  FUSEDOPT_HD static void store(char* to, const V (&from)[2]) {
    store_one(to, from[0]);
    store_one(to + 2 * kLanes, from[1]);
  }

 private:
  FUSEDOPT_HD static V load_one(const char* from) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return V(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from)));
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 8)
      return from_float<V>(Vec<float, 8>(_mm256_cvtph_ps(read<__m128i>(from))));
#endif
    return from_float<V>(float_from_half_bits(read_halves<kLanes>(from)));
  }
  FUSEDOPT_HD static void store_one(char* to, V value) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16)
      return write(to, _mm512_maskz_cvtps_ph(0xffff, __m512(value.raw), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
    if constexpr (kLanes == 8)
      return write(to, _mm256_cvtps_ph(__m256(to_float(value).raw), _MM_FROUND_TO_NEAREST_INT));
#endif
    write_halves(to, half_bits_from_float(to_float(value)));
  }
};

}  // namespace
}  // namespace fusedopt::cpu

namespace fusedopt {

template <class T, int kLanes>
struct Lanes<cpu::Vec<T, kLanes>> {
  using Float = cpu::Vec<float, kLanes>;
  using Bits = cpu::Vec<uint32_t, kLanes>;
};

}  // namespace fusedopt
