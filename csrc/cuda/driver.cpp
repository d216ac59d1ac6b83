#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "cuda/runtime.h"
#include "cuda/table.h"

namespace fusedopt::cuda {
namespace {

// Page-locked memory that copies to the device are made from; to be used again when they are done.
struct Staging {
  std::shared_ptr<void> memory;
  int64_t bytes;
  runtime::Point done;

  ~Staging() { done.wait(); }
};

// What is kept of one device.
class Device {
 public:
  Device(int gpu, const Allocate& allocate) : gpu_(gpu), allocate_(allocate) {}

  void prepare(const Share& share) {
    const bool capturing = is_capturing(gpu_, share.stream);
    if (arrangement_.update(share)) table_.reset();
    for (const Column& column : arrangement_.columns())
      if (checked_.count(column.column) == 0) {
        runtime::check_kernels(gpu_, share.rule, column.column);
        checked_.insert(column.column);
      }
    if (capturing)
      prepare_capture(share);
    else
      prepare_table(share);
  }

  void launch(const Share& share) {
    try {
      enqueue(share);
    } catch (...) {
      table_.reset();  // the device may not have what its image says
      throw;
    }
  }

 private:
  void enqueue(const Share& share) {
    Table& table = *current_;
    if (table.image().bytes_changed() > 0) {
      const Image& image = table.image();
      std::memcpy(staging_->memory.get(), image.changes(),
                  static_cast<size_t>(image.bytes_changed()));
      runtime::copy_to_device(table.at(image.first_change()), staging_->memory.get(),
                              image.bytes_changed(), share.stream);
      staging_->done.record(share.stream);
      table.image().is_sent();
    }
    for (const Column& column : arrangement_.columns()) {
      if (share.clocks != nullptr) schedule(share, column);
      update(share, column);
    }
  }

  std::unique_ptr<Table> make_table(const Share& share, Memory kind) {
    const Parts parts = plan_parts(share, arrangement_);
    return std::make_unique<Table>(parts, allocate_(gpu_, parts.bytes, kind), share.stream);
  }

  void prepare_table(const Share& share) {
    if (table_ == nullptr || !table_->fits(share)) table_ = make_table(share, Memory::kDevice);
    table_->fill(share, arrangement_);
    current_ = table_.get();
    if (table_->image().bytes_changed() > 0) staging_ = &find_staging(table_->image());
  }

  // A captured graph reads its table in every replay, so the table is the graph's own, in memory
  // that no other graph uses. It is sent now and not by the graph: it stays as it is.
  void prepare_capture(const Share& share) {
    auto table = make_table(share, Memory::kLasting);
    table->fill(share, arrangement_);
    runtime::copy_to_device_now(table->at(0), table->image().changes(), table->image().size());
    table->image().is_sent();
    captured_.push_back(std::move(table));
    current_ = captured_.back().get();
  }

  Staging& find_staging(const Image& image) {
    for (const auto& staging : stagings_)
      if (staging->bytes >= image.bytes_changed() && staging->done.is_passed()) return *staging;
    const int64_t bytes = image.size();
    stagings_.push_back(std::unique_ptr<Staging>(
        new Staging{allocate_(gpu_, bytes, Memory::kPageLocked), bytes, {}}));
    return *stagings_.back();
  }

  // The scalars that the device computes for a column.
  void* computed(const Column& column) const {
    return current_->at(current_->parts().computed +
                        column.first_row * static_cast<int64_t>(sizeof(Scalars)));
  }

  void schedule(const Share& share, const Column& column) const {
    const Parts& parts = current_->parts();
    ScheduleArguments arguments = {};
    arguments.clocks =
        reinterpret_cast<const Clock*>(current_->at(parts.clocks)) + column.first_row;
    arguments.groups = reinterpret_cast<const HyperSource*>(current_->at(parts.groups));
    arguments.scalars = computed(column);
    arguments.grad_scale = share.grad_scale;
    arguments.found_inf = share.found_inf;
    arguments.num_rows = column.num_rows;
    arguments.in_double = in_double(column.column);
    runtime::schedule(share.rule, arguments, share.stream);
  }

  void update(const Share& share, const Column& column) const {
    const Parts& parts = current_->parts();
    UpdateCall call = {};
    call.rule = share.rule;
    call.column = column.column;
    call.stream = share.stream;
    call.works = reinterpret_cast<const Work*>(current_->at(parts.works)) + column.first_row;
    call.chunks =
        reinterpret_cast<const ChunkStart*>(current_->at(parts.chunks)) + column.first_chunk;
    call.layouts = reinterpret_cast<const Layout*>(current_->at(parts.layouts));
    call.found_inf = share.found_inf;
    call.num_chunks = column.num_chunks;
    if (share.clocks != nullptr) {
      call.scalars = computed(column);
    } else if (has_few_scalars(share)) {
      call.few_scalars = share.scalars;
      call.num_few_scalars = share.num_scalars;
    } else {
      call.scalars = current_->at(parts.scalars[in_double(column.column)]);
    }
    runtime::update(call);
  }

  const int gpu_;
  const Allocate& allocate_;
  Arrangement arrangement_;
  std::set<int> checked_;
  std::unique_ptr<Table> table_;
  std::vector<std::unique_ptr<Table>> captured_;
  std::vector<std::unique_ptr<Staging>> stagings_;
  // Of the step that is prepared.
  Table* current_ = nullptr;
  Staging* staging_ = nullptr;
};

class CudaDriver : public Driver {
 public:
  explicit CudaDriver(Allocate allocate) : allocate_(std::move(allocate)) {}

  void prepare(const Share& share) override {
    const runtime::OnGpu on_gpu(share.gpu);
    devices_.try_emplace(share.gpu, share.gpu, allocate_).first->second.prepare(share);
  }

  void launch(const Share& share) override {
    const runtime::OnGpu on_gpu(share.gpu);
    devices_.at(share.gpu).launch(share);
  }

 private:
  const Allocate allocate_;
  std::map<int, Device> devices_;
};

}  // namespace

std::unique_ptr<Driver> make_driver(Allocate allocate) {
  return std::make_unique<CudaDriver>(std::move(allocate));
}

}  // namespace fusedopt::cuda
