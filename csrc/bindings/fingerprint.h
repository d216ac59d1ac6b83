#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

// Tells cheaply whether a tensor is what it was in the step before: the same object, at the same
// memory, with the same shape, strides and dtype. DLPack's answer costs a hundred nanoseconds for
// each tensor, which is most of a step when there are thousands of small ones.
//
// A fingerprint mixes the words of torch's own description of the tensor, without knowing what they
// mean. Where they lie is found out at import from what torch says of probe tensors; then every
// kind of change that matters is made to a probe and must show. If anything is not as expected, all
// fingerprints are kNoFingerprint, which equals nothing, and every tensor is read in every step.
namespace fusedopt {

inline constexpr uint64_t kNoFingerprint = 0;

// Dims beyond this may be described outside of the words that are mixed.
inline constexpr int kMaxFingerprintDims = 5;

// Finds out whether and where; call once, at import.
void learn_fingerprints();

bool has_fingerprints();

// Of a plain tensor (not of a subclass). Never to be used on objects that may be gone.
uint64_t fingerprint(PyObject* tensor);

// One for two, in this order.
inline uint64_t join_fingerprints(uint64_t first, uint64_t second) {
  const uint64_t both = first * 0x9e3779b97f4a7c15u + second;
  return both != kNoFingerprint ? both : 1;
}

// torch's dispatch keys of a tensor that wraps no other, a bit set; kNoKeys if they have not been
// found. Being lazily negated or conjugated is one of them.
inline constexpr uint64_t kNoKeys = 0;
uint64_t dispatch_keys(PyObject* tensor);
bool has_dispatch_keys();

// Ask for the memory that fingerprint() will read, in two steps: the second reads what the first
// has asked for. Of any tensor.
void prefetch_description(PyObject* tensor);
void prefetch_storage(PyObject* tensor);

}  // namespace fusedopt
