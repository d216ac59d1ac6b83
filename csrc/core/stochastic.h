#pragma once

#include <cstdint>

#include "core/lanes.h"
#include "core/layout.h"
#include "core/macros.h"

// Stochastic rounding to bfloat16: up or down with the probabilities that make the mean right. The
// draws come from a counter-based generator, so a resumed run repeats them: a hash of seed, step,
// number of the element in its tensor, and the element's new weight before it is rounded. The
// weight keeps tensors of one shape from all being rounded the same way. Two neighbours share the
// work of the hash.
namespace fusedopt {

// Every input bit changes every output bit with a probability of nearly one half (C. Wellons, "Hash
// function prospector", 2018: the function he names lowbias32). Of words, or of several at once.
template <class Bits>
FUSEDOPT_HD Bits hash(Bits x) {
  x = (x ^ (x >> 16)) * Bits(0x7feb352du);
  x = (x ^ (x >> 15)) * Bits(0x846ca68bu);
  return x ^ (x >> 16);
}

FUSEDOPT_HD uint32_t rounding_key(uint32_t seed, uint64_t step) {
  const uint32_t high = hash(static_cast<uint32_t>(step >> 32) + 0x9e3779b9u);
  return hash(seed ^ hash(static_cast<uint32_t>(step) ^ high));
}

// For the pairs of elements whose numbers have the same upper half as `pair`.
FUSEDOPT_HD uint32_t draw_key(uint32_t rounding_key, uint64_t pair) {
  return rounding_key ^ static_cast<uint32_t>(pair >> 32) * 0x9e3779b1u;
}

// What elements 2 `pair` and 2 `pair` + 1 have in common; `pair` is its lower half.
template <class Bits>
FUSEDOPT_HD Bits pair_draw(uint32_t key, Bits pair) {
  return hash(pair + Bits(key));
}

// What the second of them has instead; the first has that.
template <class Bits>
FUSEDOPT_HD Bits second_of_pair(Bits pair_draw) {
  return (pair_draw << 16) | (pair_draw >> 16);
}

// What an element has of it, by its number.
FUSEDOPT_HD uint32_t own_draw(uint32_t rounding_key, uint64_t element) {
  const uint64_t pair = element / 2;
  const uint32_t draw = pair_draw(draw_key(rounding_key, pair), static_cast<uint32_t>(pair));
  return (element & 1) != 0 ? second_of_pair(draw) : draw;
}

// What the draws of an element's operands are made of.
template <class Bits>
FUSEDOPT_HD Bits element_draw(Bits draw, Bits weight) {
  return draw + weight * Bits(0x85ebca6bu);
}

// Adam's second moment, of which nothing else is rounded stochastically by default, takes its draw
// from that.
inline constexpr int kCheapest = kFirstState + 1;

// The other operands take theirs from this. With less mixing, tensors of equal weights would be
// rounded alike more often than by chance.
template <class Bits>
FUSEDOPT_HD Bits mixed(Bits element_draw) {
  const Bits x = (element_draw ^ (element_draw >> 15)) * Bits(0x2c1b3c6du);
  return x ^ (x >> 16);
}

// 16 bits; any two operands' are independent of each other.
template <class Bits>
FUSEDOPT_HD Bits draw_for(int operand, Bits draw) {
  if (operand == kCheapest) return draw >> 16;
  if (operand == kFirstState) return draw & 0xffffu;
  return (draw * Bits(0x297a2d39u + 0x61c88646u * static_cast<uint32_t>(operand))) >> 16;
}

// A finite number never becomes infinite, infinities and NaNs stay. The result is a bfloat16, still
// as a float. `value` is a result of arithmetic: a NaN then has a bit in its upper half.
template <class Float, class Bits>
FUSEDOPT_HD Float round_stochastically(Float value, Bits draw, int operand) {
  const Bits bits = as_bits(value);
  const auto stays = (bits & 0x7fffffffu) > Bits(0x7f7effffu);  // the last finite one, and more
  const Bits moved = bits + draw_for(operand, draw);
  return as_float(select(stays, bits, moved) & 0xffff0000u);
}

}  // namespace fusedopt
