#pragma once

#include <cstdint>

#include "core/bits.h"
#include "core/macros.h"

// Stochastic rounding to bfloat16: up or down with the probabilities that make the mean right. The
// draws come from a counter-based generator, so a resumed run repeats them: a hash of seed, step,
// number of the element in its tensor, operand, and the upper half of the number to be rounded.
// That half keeps tensors of one shape from all being rounded the same way; the lower half, which
// the draw decides on, has no part in it.
namespace fusedopt {

// Every input bit changes every output bit with a probability of nearly one half (C. Wellons, "Hash
// function prospector", 2018: the function he names lowbias32).
FUSEDOPT_HD uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

FUSEDOPT_HD uint32_t rounding_key(uint32_t seed, uint64_t step) {
  const uint32_t high = hash(static_cast<uint32_t>(step >> 32) + 0x9e3779b9u);
  return hash(seed ^ hash(static_cast<uint32_t>(step) ^ high));
}

// What the draws for the operands of one element have in common. `key` as draw_key() gives it for
// the upper half of the element's number, `element` the lower half.
FUSEDOPT_HD uint32_t draw_key(uint32_t rounding_key, uint64_t element) {
  return rounding_key ^ static_cast<uint32_t>(element >> 32) * 0x9e3779b1u;
}

FUSEDOPT_HD uint32_t element_draw(uint32_t key, uint32_t element) { return hash(element + key); }

// A whole hash once more: with less, numbers whose kept bits differ in a few places are rounded
// alike more often than by chance.
FUSEDOPT_HD uint32_t draw_for(uint32_t element_draw, uint32_t kept_bits, int operand) {
  const uint32_t salt = static_cast<uint32_t>(operand) * 0x9e3779b9u;
  return hash(element_draw + kept_bits * 0x85ebca6bu + salt) >> 16;
}

// A finite number never becomes infinite, infinities stay and NaNs stay NaNs. The result is a
// bfloat16, still as a float.
FUSEDOPT_HD float round_stochastically(float value, uint32_t element_draw, int operand) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t draw = draw_for(element_draw, bits >> 16, operand);
  const uint32_t down = bits & 0xffff0000u;
  const uint32_t rounded = (bits + draw) & 0xffff0000u;
  const uint32_t overflows = (rounded & 0x7f800000u) == 0x7f800000u;
  const uint32_t nan = down | 0x400000u;
  return bit_cast<float>(value != value ? nan : overflows ? down : rounded);
}

}  // namespace fusedopt
