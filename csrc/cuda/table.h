#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/gpu.h"
#include "cuda/image.h"
#include "cuda/launch.h"

// The device's side of a step: what its kernels read, in one block of device memory.
namespace fusedopt::cuda {

// Works of one column, neighbours in the table, and the launch that does them.
struct Rows {
  Column column;
  int64_t first_row, num_rows;
  int64_t first_chunk, num_chunks;  // and one more start, the end
  int64_t scalars;                  // which table of scalars: columns of the same types share one
};

// The works of one device, sorted by column. All of it follows from what their columns and sizes
// are.
class Arrangement {
 public:
  // Takes in what a step brings; true if something is not as it was.
  bool update(const Share& share);

  const std::vector<int64_t>& rows() const { return rows_; }  // numbers of works
  const std::vector<Rows>& columns() const { return columns_; }
  int64_t num_scalars_tables() const { return num_scalars_tables_; }
  const std::vector<ChunkStart>& chunks() const { return chunks_; }  // rows count from first_row
  // Leaves of the global norm of the grads that there are, in the order of the works; rows count
  // from 0. They take no more room than those of all grads.
  const std::vector<ChunkStart>& find_leaves(const Share& share);
  int64_t max_leaves() const;  // and the end

 private:
  void arrange();

  struct Member {
    bool is_here = false;  // on this device
    Column column = {};
    int64_t numel = 0;
  };
  std::vector<Member> members_;  // one for each work of the optimizer
  std::vector<int64_t> rows_;
  std::vector<Rows> columns_;
  int64_t num_scalars_tables_ = 0;
  std::vector<ChunkStart> chunks_;
  std::vector<ChunkStart> leaves_;  // of grads of
  std::vector<int64_t> leaf_sizes_;
};

// The block's parts, by their offsets: those that change most often come last.
struct Parts {
  int64_t chunks, leaves, dims, layouts, groups, clocks, works;
  int64_t scalars;      // tables, Rows::scalars
  int64_t image_bytes;  // of all these
  int64_t computed;     // scalars that the device computes, sizeof(Scalars) for each row
  int64_t sums;         // a GradSum for each leaf
  int64_t bytes;
  // What there is room for.
  int64_t max_dims, max_layouts, max_groups, max_scalars;
  bool has_clocks;
  bool has_leaves;
};

class Table {
 public:
  Table(const Parts& parts, std::shared_ptr<void> memory, void* stream)
      : parts_(parts), memory_(std::move(memory)), stream_(stream), image_(parts.image_bytes) {}

  // Whether a step's share has room here.
  bool fits(const Share& share) const;
  const std::shared_ptr<void>& memory() const { return memory_; }
  Image& image() { return image_; }
  uint8_t* at(int64_t offset) const { return static_cast<uint8_t*>(memory_.get()) + offset; }
  const Parts& parts() const { return parts_; }
  int64_t scalars_of(const Rows& rows) const;  // where that table is

  // Brings the image up to date.
  void fill(const Share& share, Arrangement& arrangement);

 private:
  void fill_layouts(const Share& share);
  void fill_works(const Share& share, const Arrangement& arrangement);

  Parts parts_;
  std::shared_ptr<void> memory_;
  void* stream_;
  Image image_;
};

// Room for a share, and some more.
Parts plan_parts(const Share& share, const Arrangement& arrangement);

// True if the scalars of all columns travel with the kernel's arguments.
bool has_few_scalars(const Share& share);

}  // namespace fusedopt::cuda
