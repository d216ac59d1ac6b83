// What a chunk consists of. Part of isa_kernels.h, which says what must not be used here.
#pragma once

#include "core/step.h"

namespace fusedopt::cpu {
namespace {

// The parts of updates that make up a chunk, one after the other.
class Parts {
 public:
  Parts(const Step& step, int64_t chunk) {
    const ChunkStart from = step.chunks[chunk], to = step.chunks[chunk + 1];
    update_ = step.updates + from.update;
    begin_ = from.element;
    cut_ = step.updates + to.update;
    cut_at_ = to.element;
    stop_ = cut_at_ > 0 ? cut_ + 1 : cut_;
    skip();
  }

  bool done() const { return update_ == stop_; }
  const ParamUpdate& update() const { return *update_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return update_ == cut_ ? cut_at_ : update_->numel; }
  void next() {
    pass();
    skip();
  }

 private:
  void pass() {
    ++update_;
    begin_ = 0;
  }
  // Passes over what there is not to do.
  void skip() {
    while (!done() && (update_->device != kCpu || begin() >= end())) pass();
  }

  const ParamUpdate* update_;
  int64_t begin_;
  const ParamUpdate* cut_;  // of which the chunk has what is before `cut_at_`
  int64_t cut_at_;
  const ParamUpdate* stop_;
};

}  // namespace
}  // namespace fusedopt::cpu
