// The device's side of a step: what its kernels read, in one block of device memory, and how
// updates are sorted into launches. The table is kept between steps; HostMirror finds what has
// changed, and only that is copied to the device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/gpu.h"
#include "cuda/host_mirror.h"
#include "cuda/launch.h"

namespace fusedopt::cuda {

// The updates with the same key, which are neighbouring rows of the table, and their chunks.
struct Launch {
  LaunchKey key;
  int64_t first_row, num_rows;
  int64_t first_chunk, num_chunks;  // one more start follows, the end
  int64_t first_leaf, num_leaves;   // of their grads (core/norm.h); as with chunks
  int64_t scalars;                  // which table of scalars; launches of one rule and type share
};

// The updates of one device, sorted by launch and cut into chunks. All of it follows from their
// keys and sizes, so it is made anew only if one of these changes, which is rare.
class Partition {
 public:
  // Compares a step with the one before. Returns true, and has partitioned anew, if an update has
  // another key or size, or has come to or left this device. One without a grad keeps its row.
  bool update(const DeviceStep& device_step);

  const std::vector<int64_t>& rows() const { return rows_; }  // indices into DeviceStep::updates
  const std::vector<Launch>& launches() const { return launches_; }
  int64_t num_scalars_tables() const { return num_scalars_tables_; }
  // Starts of all launches' chunks. ChunkStart::update counts rows from the launch's first_row.
  const std::vector<ChunkStart>& chunks() const { return chunks_; }
  const std::vector<ChunkStart>& leaves() const { return leaves_; }  // the same

 private:
  void divide_up();

  struct Member {
    bool is_here = false;  // on this device
    LaunchKey key = {};
    int64_t numel = 0;
  };
  std::vector<Member> members_;  // one for each update of the optimizer
  bool is_current_ = false;      // whether all below follows from them
  std::vector<int64_t> rows_;
  std::vector<Launch> launches_;
  int64_t num_scalars_tables_ = 0;
  std::vector<ChunkStart> chunks_;
  std::vector<ChunkStart> leaves_;
};

// The parts of the block, as offsets. Those that change most often come last, because what is sent
// is one range, from the first to the last byte that changed.
struct TableLayout {
  int64_t chunks, leaves, dims, layouts, groups, counters, updates;
  int64_t scalars;       // one table after the other, by Launch::scalars
  int64_t mirror_bytes;  // size of all parts above, which the host writes
  int64_t computed;      // scalars that the device computes, sizeof(Scalars) for each row
  int64_t bytes;
  // What there is room for.
  int64_t max_dims, max_layouts, max_groups, max_scalars;
  bool has_counters;
  bool has_leaves;
};

// A table in device memory, and what the host knows of its contents.
class DeviceTable {
 public:
  DeviceTable(const TableLayout& parts, std::shared_ptr<void> memory, void* stream)
      : parts_(parts), memory_(std::move(memory)), stream_(stream), mirror_(parts.mirror_bytes) {}

  // Whether a step has room here. A table also serves one stream only: another stream would not
  // wait until this one has read it.
  bool fits(const DeviceStep& device_step) const;
  const std::shared_ptr<void>& memory() const { return memory_; }
  HostMirror& mirror() { return mirror_; }
  uint8_t* at(int64_t offset) const { return static_cast<uint8_t*>(memory_.get()) + offset; }
  const TableLayout& parts() const { return parts_; }
  int64_t scalars_of(const Launch& launch) const;  // offset of the table of scalars of a launch

  // Writes a step into the mirror. What changes by it is then to be sent.
  void fill(const DeviceStep& device_step, const Partition& partition);

 private:
  void fill_layouts(const DeviceStep& device_step);
  void fill_updates(const DeviceStep& device_step, const Partition& partition);

  TableLayout parts_;
  std::shared_ptr<void> memory_;
  void* stream_;
  HostMirror mirror_;
};

// Plans a table for a step. Counts that may grow are rounded up to powers of two, so that a loop
// which adds param groups or layouts does not get a new table each time.
TableLayout plan_table(const DeviceStep& device_step, const Partition& partition);

// True if the scalars of all launches fit among the kernels' arguments, whatever their rules and
// types.
bool has_few_scalars(const DeviceStep& device_step);

}  // namespace fusedopt::cuda
