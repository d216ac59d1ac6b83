// Stochastic rounding to bfloat16, and of weights to 24 bits (core/weight.h): up or down with the
// probabilities that make the mean right.
//
// The draws come from a counter-based generator, so that a resumed run repeats them: a hash of the
// seed, the step, the number of the element in its tensor, and the element's new weight before it
// is rounded, or for a code of 8 bits the new state. The weight keeps tensors of one shape from all
// being rounded in the same way. Two neighbouring elements share one hash of their numbers, which
// halves its cost.
#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/layout.h"
#include "core/macros.h"
#include "core/narrow.h"

namespace fusedopt {

// A hash of a word, or of several side by side: the function that C. Wellons calls lowbias32 ("Hash
// function prospector", 2018). Every input bit changes every output bit with a probability of
// nearly one half.
template <class Bits>
FUSEDOPT_HD Bits hash(Bits x) {
  x = (x ^ (x >> 16)) * Bits(0x7feb352du);
  x = (x ^ (x >> 15)) * Bits(0x846ca68bu);
  return x ^ (x >> 16);
}

// What all draws of one step start from.
FUSEDOPT_HD uint32_t rounding_key(uint32_t seed, uint64_t step) {
  const uint32_t high = hash(static_cast<uint32_t>(step >> 32) + 0x9e3779b9u);
  return hash(seed ^ hash(static_cast<uint32_t>(step) ^ high));
}

// The key of pair number `pair`. It is the same for all pairs whose numbers have the same upper 32
// bits, so it is found once for many.
FUSEDOPT_HD uint32_t draw_key(uint32_t rounding_key, uint64_t pair) {
  return rounding_key ^ static_cast<uint32_t>(pair >> 32) * 0x9e3779b1u;
}

// The hash that elements 2 pair and 2 pair + 1 share; `pair` is the lower half of the number.
template <class Bits>
FUSEDOPT_HD Bits pair_draw(uint32_t key, Bits pair) {
  return hash(pair + Bits(key));
}

// The first element of a pair uses that hash as it is, the second one with its halves exchanged.
template <class Bits>
FUSEDOPT_HD Bits second_of_pair(Bits pair_draw) {
  return (pair_draw << 16) | (pair_draw >> 16);
}

// The draw of a single element, by its number in its tensor.
FUSEDOPT_HD uint32_t own_draw(uint32_t rounding_key, uint64_t element) {
  const uint64_t pair = element / 2;
  const uint32_t draw = pair_draw(draw_key(rounding_key, pair), static_cast<uint32_t>(pair));
  return (element & 1) != 0 ? second_of_pair(draw) : draw;
}

// Drivers draw for at most so many elements at once.
inline constexpr int64_t kMaxDrawBlock = 64;

// Whether the elements of a part of a tensor, which begins with the tensor's element number
// `first`, can be drawn for by blocks: pairs have both their elements in one block, and the
// elements of a block one key.
inline bool has_whole_draw_blocks(int64_t first, int64_t numel) {
  constexpr int64_t kOneKey = int64_t{2} << 32;  // so many elements have the same
  if (numel == 0 || first % kMaxDrawBlock == 0) return true;
  return first % 2 == 0 && first / kOneKey == (first + numel - 1) / kOneKey;
}

// Mixes in the element's new weight. The draws of all its operands are made of this, but for those
// of codes: these are made of the draw before, and of their own new state.
template <class Bits>
FUSEDOPT_HD Bits element_draw(Bits draw, Bits weight) {
  return draw + weight * Bits(0x85ebca6bu);
}

// The same, for less, where there are codes.
template <class Bits>
FUSEDOPT_HD Bits draw_beside_codes(Bits draw, Bits own) {
  return draw + (own << 16);
}

// The operand that takes its draw from element_draw() directly: Adam's second moment, the one that
// is rounded stochastically by default.
inline constexpr int kCheapest = kFirstState + 1;

// The other operands take their draws from this. With less mixing, tensors of equal weights would
// be rounded alike more often than by chance.
template <class Bits>
FUSEDOPT_HD Bits mixed(Bits element_draw) {
  const Bits x = (element_draw ^ (element_draw >> 15)) * Bits(0x2c1b3c6du);
  return x ^ (x >> 16);
}

// The upper half depends on all bits of the draw, for each operand in another way.
template <class Bits>
FUSEDOPT_HD Bits multiplied(int operand, Bits draw) {
  return draw * Bits(0x297a2d39u + 0x61c88646u * static_cast<uint32_t>(operand));
}

// 16 random bits for an operand. Those of any two operands of an element are independent of each
// other.
template <class Bits>
FUSEDOPT_HD Bits draw_for(int operand, Bits draw) {
  if (operand == kCheapest) return draw >> 16;
  if (operand == kFirstState) return draw & 0xffffu;
  return multiplied(operand, draw) >> 16;
}

// The same of a state that is codes: 24 bits, into whose upper half its new number's lower half is
// mixed. Of the hash, the upper half is that of no other state.
template <class Bits>
FUSEDOPT_HD Bits draw_for_code(int operand, Bits draw, Bits state) {
  if (operand == kCheapest) draw = second_of_pair(draw);
  if (operand > kCheapest) draw = multiplied(operand, draw);
  return draw_beside_codes(draw, state) >> 8;
}

// 8 random bits for a weight that is rounded to 24; and where there are codes, from the bits that
// count least for these.
template <class Bits>
FUSEDOPT_HD Bits draw_for_weight(Bits draw) {
  return draw_for(kMaster, draw) >> 8;
}
template <class Bits>
FUSEDOPT_HD Bits draw_for_weight_beside_codes(Bits draw) {
  return third_byte(draw);
}

// Adds 16 random bits below the last bit that stays, and cuts off what is below. The result is a
// bfloat16, as a float. A finite number never becomes infinite; infinities and NaNs stay. `value`
// must be a result of arithmetic, so that a NaN has a bit in its upper half and is still one when
// it is cut.
// With `kAreOrdinary`, no value is NaN or above kLargestOrdinary, and what is below is not cut off:
// who stores bfloat16 does not look at it.
inline constexpr uint32_t kLargestOrdinary = 0x7f7effffu;  // below the largest finite bfloat16
template <bool kAreOrdinary = false, class Float, class Bits>
FUSEDOPT_HD Float round_stochastically(Float value, Bits draw, int operand) {
  const Bits bits = as_bits(value);
  const Bits moved = bits + draw_for(operand, draw);
  if constexpr (kAreOrdinary) return as_float(moved);
  const auto stays = (bits & 0x7fffffffu) > Bits(kLargestOrdinary);
  return as_float(select(stays, bits, moved) & 0xffff0000u);
}

}  // namespace fusedopt
