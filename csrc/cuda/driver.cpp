#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
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
constexpr int kMaxStagings = 64;
constexpr int64_t kMinStagingBytes = 4096;

// What is kept of one device.
class Device {
 public:
  Device(int gpu, const Allocate& allocate) : gpu_(gpu), allocate_(allocate) {}

  ~Device() {
    try {
      const runtime::OnGpu on_gpu(gpu_);
      stagings_.clear();
    } catch (const std::exception&) {  // the process ends and CUDA with it
    }
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void prepare(const Share& share) {
    const bool capturing = is_capturing(gpu_, share.stream);
    if (arrangement_.update(share)) table_.reset();
    if (!is_checked_) runtime::check_kernels(gpu_);
    is_checked_ = true;
    if (capturing)
      prepare_capture(share);
    else
      prepare_table(share);
  }

  // The reading of the grads; what was prepared is sent first.
  void measure(const Share& share) {
    try {
      send(share);
      enqueue_measuring(share);
    } catch (...) {
      table_.reset();
      throw;
    }
  }

  void judge(const Share& share) const {
    runtime::judge(judging(share, share.verdict), share.stream);
  }

  void launch(const Share& share) {
    try {
      send(share);
      for (const Rows& rows : arrangement_.columns()) {
        if (share.clocks != nullptr) schedule(share, rows);
        update(share, rows);
      }
    } catch (...) {
      table_.reset();  // the device may not have what its image says
      throw;
    }
  }

 private:
  void send(const Share& share) {
    Table& table = *current_;
    if (table.image().bytes_changed() == 0) return;
    const Image& image = table.image();
    std::memcpy(staging_->memory.get(), image.changes(),
                static_cast<size_t>(image.bytes_changed()));
    runtime::copy_to_device(table.at(image.first_change()), staging_->memory.get(),
                            image.bytes_changed(), share.stream);
    staging_->done.record(share.stream);
    table.image().is_sent();
  }

  void enqueue_measuring(const Share& share) {
    const Parts& parts = current_->parts();
    MeasureCall call = {};
    call.stream = share.stream;
    call.arguments.works = reinterpret_cast<const Work*>(current_->at(parts.works));
    call.arguments.leaves = reinterpret_cast<const ChunkStart*>(current_->at(parts.leaves));
    call.arguments.layouts = reinterpret_cast<const Layout*>(current_->at(parts.layouts));
    call.arguments.sums = reinterpret_cast<GradSum*>(current_->at(parts.sums));
    call.num_leaves = static_cast<int64_t>(arrangement_.find_leaves(share).size()) - 1;
    for (const int64_t w : arrangement_.rows()) {
      if (share.works[w].device == kIdle) continue;
      const bool is_double = share.works[w].formats.dtypes[kGrad] == DType::kFloat64;
      (is_double ? call.in_double : call.in_float) = true;
    }
    runtime::measure(call);
    for (int64_t c = 0; c < share.num_classes; ++c) {
      const TotalArguments total = {call.arguments.sums, call.num_leaves, static_cast<int32_t>(c),
                                    share.totals + 2 * c};
      runtime::total(total, judging(share, share.judges ? share.verdict : nullptr), share.stream);
    }
  }

  static JudgeArguments judging(const Share& share, Verdict* verdict) {
    return {share.totals, share.grad_scale, share.found_inf, verdict, share.clips};
  }

  // The flag that makes a step do nothing.
  static const float* skip_flag(const Share& share) {
    return share.measures ? &share.verdict->skip : share.found_inf;
  }

  void prepare_table(const Share& share) {
    if (table_ == nullptr || !table_->fits(share)) {
      const Parts parts = plan_parts(share, arrangement_);
      table_ = std::make_unique<Table>(parts, allocate_(gpu_, parts.bytes, Memory::kDevice),
                                       share.stream);
    }
    table_->fill(share, arrangement_);
    current_ = table_.get();
    const int64_t bytes = table_->image().bytes_changed();
    if (bytes > 0) staging_ = &find_staging(bytes);
  }

  // A captured graph reads its table in every replay, so the table is the graph's own, in memory
  // that no other graph uses. It is sent now and not by the graph: it stays as it is.
  void prepare_capture(const Share& share) {
    const Parts parts = plan_parts(share, arrangement_);
    capture_ = std::make_unique<Table>(parts, runtime::allocate_lasting(parts.bytes), share.stream);
    capture_->fill(share, arrangement_);
    Image& image = capture_->image();
    runtime::copy_to_device_now(capture_->at(0), image.changes(), image.size());
    image.is_sent();
    captured_.push_back(capture_->memory());
    current_ = capture_.get();
  }

  // The step that used a staging first has long been done, unless the host is far ahead.
  Staging& find_staging(int64_t bytes) {
    const auto fits = [&](const auto& staging) { return staging->bytes >= bytes; };
    const auto end = stagings_.end();
    const auto free = std::find_if(stagings_.begin(), end, [&](const auto& staging) {
      return fits(staging) && staging->done.is_passed();
    });
    if (free != end) return **free;
    if (static_cast<int>(stagings_.size()) >= kMaxStagings) stagings_.pop_front();
    int64_t room = kMinStagingBytes;
    while (room < bytes) room *= 2;
    stagings_.push_back(std::unique_ptr<Staging>(
        new Staging{allocate_(gpu_, room, Memory::kPageLocked), room, {}}));
    return *stagings_.back();
  }

  // The scalars that the device computes for a column.
  void* computed(const Rows& rows) const {
    return current_->at(current_->parts().computed +
                        rows.first_row * static_cast<int64_t>(sizeof(Scalars)));
  }

  void schedule(const Share& share, const Rows& rows) const {
    const Parts& parts = current_->parts();
    ScheduleArguments arguments = {};
    arguments.clocks = reinterpret_cast<const Clock*>(current_->at(parts.clocks)) + rows.first_row;
    arguments.groups = reinterpret_cast<const HyperSource*>(current_->at(parts.groups));
    arguments.scalars = computed(rows);
    arguments.grad_scale = share.grad_scale;
    arguments.skip = skip_flag(share);
    arguments.grad_norm = share.measures ? &share.verdict->grad_norm : nullptr;
    arguments.num_rows = rows.num_rows;
    arguments.in_double = rows.column.formats.in_double();
    runtime::schedule(rows.column.rule, arguments, share.stream);
  }

  void update(const Share& share, const Rows& rows) const {
    const Parts& parts = current_->parts();
    UpdateCall call = {};
    call.column = rows.column;
    call.stream = share.stream;
    call.works = reinterpret_cast<const Work*>(current_->at(parts.works)) + rows.first_row;
    call.chunks =
        reinterpret_cast<const ChunkStart*>(current_->at(parts.chunks)) + rows.first_chunk;
    call.layouts = reinterpret_cast<const Layout*>(current_->at(parts.layouts));
    call.skip = skip_flag(share);
    call.num_chunks = rows.num_chunks;
    if (share.clocks != nullptr) {
      call.scalars = computed(rows);
    } else if (has_few_scalars(share)) {
      call.few_scalars = share.scalars;
      call.num_few_scalars = share.num_scalars;
    } else {
      call.scalars = current_->at(current_->scalars_of(rows));
    }
    runtime::update(call);
  }

  const int gpu_;
  const Allocate& allocate_;
  Arrangement arrangement_;
  bool is_checked_ = false;
  std::unique_ptr<Table> table_;
  std::unique_ptr<Table> capture_;               // of the latest capture
  std::vector<std::shared_ptr<void>> captured_;  // memory of all captures
  std::deque<std::unique_ptr<Staging>> stagings_;
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

  void measure(const Share& share) override {
    const runtime::OnGpu on_gpu(share.gpu);
    devices_.at(share.gpu).measure(share);
  }

  void judge(const Share& share) override {
    const runtime::OnGpu on_gpu(share.gpu);
    devices_.at(share.gpu).judge(share);
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
