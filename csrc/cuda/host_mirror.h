// A copy on the host of what a block of device memory is to hold, and which part of it has changed
// since it was last sent. To compare bytes on the host is much cheaper than to send a table in
// every step; in a loop that keeps its grads, nothing changes and nothing is sent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fusedopt::cuda {

// At first, all bytes count as changed: the device has none of them.
class HostMirror {
 public:
  explicit HostMirror(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)), first_(0), last_(bytes) {}

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

  // Writes bytes, and takes note if they are not what was there.
  void put(int64_t offset, const void* data, int64_t bytes) {
    uint8_t* const to = bytes_.data() + offset;
    if (bytes == 0 || std::memcmp(to, data, static_cast<size_t>(bytes)) == 0) return;
    std::memcpy(to, data, static_cast<size_t>(bytes));
    first_ = std::min(first_, offset);
    last_ = std::max(last_, offset + bytes);
  }

  // The range from the first to the last byte that changed. It may include bytes that did not: one
  // copy of more bytes is cheaper than several.
  int64_t first_change() const { return std::min(first_, last_); }
  int64_t bytes_changed() const { return std::max<int64_t>(last_ - first_, 0); }
  const void* changes() const { return bytes_.data() + first_change(); }

  // To be called when the changes have been handed to a copy.
  void is_sent() {
    first_ = size();
    last_ = 0;
  }

 private:
  std::vector<uint8_t> bytes_;
  int64_t first_, last_;  // the range that changed; last_ <= first_: nothing has
};

}  // namespace fusedopt::cuda
