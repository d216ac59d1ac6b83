// Tells cheaply whether a tensor is what it was in the step before, and where its memory is now.
// DLPack's answer costs a hundred nanoseconds for each tensor, which is most of a step when there
// are thousands of small ones.
//
// The words of torch's own description of a tensor are read where they lie (torch_layout.h). If
// that is not as expected, or with FUSEDOPT_FINGERPRINTS=0 in the environment, all fingerprints are
// kNoFingerprint, which equals nothing, and every tensor is read through DLPack in every step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fusedopt {

inline constexpr uint64_t kNoFingerprint = 0;

bool has_fingerprints();

// All functions below take plain tensors (no subclasses) that are there: a fingerprint is never
// taken of objects that may be gone.

// Of how torch reads a tensor's memory: sizes, strides, offset, dtype, device, lazy conjugation.
// kNoFingerprint for more dims than are described in one piece.
uint64_t form_fingerprint(PyObject* tensor);

// Of its form, its identity and its memory. Flags of the storage, as that it raises when its memory
// is asked for (torch sets it for tensors that have none), do not show.
uint64_t fingerprint(PyObject* tensor);

// Ask the processor for the memory that fingerprint() reads, so that it is at hand a little later:
// with thousands of tensors it lies beyond the caches. That of the storage is read in the
// description.
void prefetch_description(PyObject* tensor);
void prefetch_storage(PyObject* tensor);

// Where a tensor's storage begins; nullptr if it has none, or if there are no fingerprints.
char* storage_data(PyObject* tensor);

// One for two, in this order.
inline uint64_t join_fingerprints(uint64_t first, uint64_t second) {
  const uint64_t both = first * 0x9e3779b97f4a7c15u + second;
  return both != kNoFingerprint ? both : 1;
}

// Counts a write to a tensor, so that autograd notices, as torch.autograd.graph.increment_version()
// does. False if only torch can: for inference tensors, and if the place is not known.
bool increment_version(PyObject* tensor);

// How many writes have been counted, or -1 for inference tensors; only if the place is known.
int64_t find_version(PyObject* tensor);
bool has_versions();

// torch's dispatch keys of a tensor that wraps no other, a bit set; kNoKeys if they have not been
// found. Being lazily negated or conjugated is one of them.
inline constexpr uint64_t kNoKeys = 0;
uint64_t dispatch_keys(PyObject* tensor);
bool has_dispatch_keys();

}  // namespace fusedopt
