// The CUDA driver of core/gpu.h: what it keeps of each device between steps, and the order of
// copies and launches in a step.
//
// A step is prepared first: memory is allocated and the table's mirror written. What can fail, by
// lack of memory for example, fails here, before any tensor is changed. Then it is launched: what
// has changed in the table is copied to the device in the order of the stream, and the kernels
// follow. Nothing waits for the device.

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

// Page-locked (pinned) host memory from which the table is sent. Only from such memory does a copy
// run without the host waiting for it. The copy reads the buffer some time later, when the stream
// gets there: `done` is recorded behind it, and until then the host must not write here again.
struct PinnedBuffer {
  std::shared_ptr<void> memory;
  int64_t bytes;
  runtime::Event done;

  ~PinnedBuffer() { done.wait(); }  // the copy may still be reading
};
constexpr int kMaxPinnedBuffers = 64;
constexpr int64_t kMinPinnedBytes = 4096;

// What is kept of one device. Its functions are called with the device as the current one.
class Device {
 public:
  Device(int gpu, const Allocate& allocate) : gpu_(gpu), allocate_(allocate) {}

  ~Device() {
    try {
      const runtime::DeviceGuard on_gpu(gpu_);
      buffers_.clear();
    } catch (const std::exception&) {  // the process ends, and CUDA has ended before
    }
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void prepare(const DeviceStep& device_step) {
    const bool capturing = is_capturing(gpu_, device_step.stream);
    if (partition_.update(device_step)) table_.reset();  // another partition needs another table
    if (!is_checked_) runtime::check_kernels(gpu_);
    is_checked_ = true;
    if (capturing)
      prepare_capture(device_step);
    else
      prepare_table(device_step);
  }

  // Sends what was prepared, then enqueues the reading of the grads. launch() follows, and finds
  // nothing left to send.
  void sum_squares(const DeviceStep& device_step) {
    try {
      send(device_step);
      enqueue_sums(device_step);
    } catch (...) {
      table_.reset();  // as in launch()
      throw;
    }
  }

  void finalize_norm(const DeviceStep& device_step) const {
    runtime::finalize_norm(
        {device_step.norm_sums, device_step.grad_scale, device_step.host_grad_scale,
         device_step.found_inf, device_step.status, device_step.clips},
        device_step.stream);
  }

  // One launch of the update kernel for each key; where the device computes the scalars, a small
  // kernel runs before it.
  void launch(const DeviceStep& device_step) {
    try {
      send(device_step);
      for (const Launch& launch : partition_.launches()) {
        if (device_step.counters != nullptr) step_scalars(device_step, launch);
        update(device_step, launch);
      }
    } catch (...) {
      table_.reset();  // the device may not have what the mirror says
      throw;
    }
  }

 private:
  // Copies what has changed to the device, by way of a pinned buffer, in the order of the stream:
  // kernels of earlier steps, which may still be running, read the table as it was for them.
  void send(const DeviceStep& device_step) {
    DeviceTable& table = *current_;
    if (table.mirror().bytes_changed() == 0) return;
    const HostMirror& mirror = table.mirror();
    std::memcpy(buffer_->memory.get(), mirror.changes(),
                static_cast<size_t>(mirror.bytes_changed()));
    runtime::copy_to_device(table.at(mirror.first_change()), buffer_->memory.get(),
                            mirror.bytes_changed(), device_step.stream);
    buffer_->done.record(device_step.stream);
    table.mirror().is_sent();
  }

  void enqueue_sums(const DeviceStep& device_step) const {
    const TableLayout& parts = current_->parts();
    runtime::clear(device_step.norm_sums,
                   device_step.num_classes * static_cast<int64_t>(sizeof(NormSums)),
                   device_step.stream);
    for (const Launch& launch : partition_.launches()) {
      SumSquaresCall call = {};
      call.stream = device_step.stream;
      call.arguments.updates =
          reinterpret_cast<const ParamUpdate*>(current_->at(parts.updates)) + launch.first_row;
      call.arguments.leaves =
          reinterpret_cast<const ChunkStart*>(current_->at(parts.leaves)) + launch.first_leaf;
      call.arguments.layouts = reinterpret_cast<const Layout*>(current_->at(parts.layouts));
      call.arguments.sums = device_step.norm_sums;
      call.num_leaves = launch.num_leaves;
      call.in_double = launch.key.formats.dtypes[kGrad] == DType::kFloat64;
      runtime::sum_squares(call);
    }
  }

  // The number that makes a step do nothing if it is above 0, in device memory or nullptr. Where
  // the grads are read first, GradStatus::skip includes found_inf.
  static const float* skip_flag(const DeviceStep& device_step) {
    return device_step.reads_grads ? &device_step.status->skip : device_step.found_inf;
  }

  // Outside of captures: the table of the last step, brought up to date, or a new one. Kernels may
  // still read the old one when its memory is given back, as torch's allocator hands memory out
  // again in the order of the stream.
  void prepare_table(const DeviceStep& device_step) {
    if (table_ == nullptr || !table_->fits(device_step)) {
      const TableLayout parts = plan_table(device_step, partition_);
      table_ = std::make_unique<DeviceTable>(parts, allocate_(gpu_, parts.bytes, Memory::kDevice),
                                             device_step.stream);
    }
    table_->fill(device_step, partition_);
    current_ = table_.get();
    const int64_t bytes = table_->mirror().bytes_changed();
    if (bytes > 0) buffer_ = &find_buffer(bytes);
  }

  // A captured graph reads its table in every replay, whatever steps come between, so the table is
  // the graph's own. It is in memory of cudaMalloc: what torch allocates during a capture is shared
  // by graphs, and the replay of another would write to it. It is sent now and not by the graph: a
  // captured copy would read the pinned buffer in each replay, when that holds something else.
  void prepare_capture(const DeviceStep& device_step) {
    const TableLayout parts = plan_table(device_step, partition_);
    capture_ = std::make_unique<DeviceTable>(parts, runtime::allocate_persistent(parts.bytes),
                                             device_step.stream);
    capture_->fill(device_step, partition_);
    HostMirror& mirror = capture_->mirror();
    runtime::copy_to_device_now(capture_->at(0), mirror.changes(), mirror.size());
    mirror.is_sent();
    captured_.push_back(capture_->memory());
    current_ = capture_.get();
  }

  // A pinned buffer with room for so many bytes that no copy reads any more, or a new one. There
  // are at most kMaxPinnedBuffers: beyond that, the oldest is destroyed, which waits for its copy.
  // That happens only if the host is that many steps ahead of the device.
  PinnedBuffer& find_buffer(int64_t bytes) {
    const auto fits = [&](const auto& buffer) { return buffer->bytes >= bytes; };
    const auto end = buffers_.end();
    const auto free = std::find_if(buffers_.begin(), end, [&](const auto& buffer) {
      return fits(buffer) && buffer->done.is_done();
    });
    if (free != end) return **free;
    if (static_cast<int>(buffers_.size()) >= kMaxPinnedBuffers) buffers_.pop_front();
    int64_t room = kMinPinnedBytes;
    while (room < bytes) room *= 2;
    buffers_.push_back(std::unique_ptr<PinnedBuffer>(
        new PinnedBuffer{allocate_(gpu_, room, Memory::kPageLocked), room, {}}));
    return *buffers_.back();
  }

  // Where the device computes the scalars of a launch.
  void* computed(const Launch& launch) const {
    return current_->at(current_->parts().computed +
                        launch.first_row * static_cast<int64_t>(sizeof(Scalars)));
  }

  void step_scalars(const DeviceStep& device_step, const Launch& launch) const {
    const TableLayout& parts = current_->parts();
    StepScalarsArguments arguments = {};
    arguments.counters =
        reinterpret_cast<const StepCounter*>(current_->at(parts.counters)) + launch.first_row;
    arguments.groups = reinterpret_cast<const HyperParamsRef*>(current_->at(parts.groups));
    arguments.scalars = computed(launch);
    arguments.grad_scale = device_step.grad_scale;
    arguments.host_grad_scale = device_step.host_grad_scale;
    arguments.skip = skip_flag(device_step);
    arguments.grad_norm = device_step.reads_grads ? &device_step.status->grad_norm : nullptr;
    arguments.num_rows = launch.num_rows;
    arguments.in_double = launch.key.formats.in_double();
    runtime::step_scalars(launch.key.rule, arguments, device_step.stream);
  }

  void update(const DeviceStep& device_step, const Launch& launch) const {
    const TableLayout& parts = current_->parts();
    UpdateCall call = {};
    call.key = launch.key;
    call.stream = device_step.stream;
    call.updates =
        reinterpret_cast<const ParamUpdate*>(current_->at(parts.updates)) + launch.first_row;
    call.chunks =
        reinterpret_cast<const ChunkStart*>(current_->at(parts.chunks)) + launch.first_chunk;
    call.layouts = reinterpret_cast<const Layout*>(current_->at(parts.layouts));
    call.skip = skip_flag(device_step);
    call.num_chunks = launch.num_chunks;
    if (device_step.counters != nullptr) {
      call.scalars = computed(launch);
    } else if (has_few_scalars(device_step)) {
      call.few_scalars = device_step.scalars;
      call.num_few_scalars = device_step.num_scalars;
    } else {
      call.scalars = current_->at(current_->scalars_of(launch));
    }
    runtime::update(call);
  }

  const int gpu_;
  const Allocate& allocate_;
  Partition partition_;
  bool is_checked_ = false;
  std::unique_ptr<DeviceTable> table_;
  std::unique_ptr<DeviceTable> capture_;         // the table of the latest captured step
  std::vector<std::shared_ptr<void>> captured_;  // memory of all tables that graphs may still read
  std::deque<std::unique_ptr<PinnedBuffer>> buffers_;
  // Of the step that is prepared: its table, and the buffer from which it is to be sent.
  DeviceTable* current_ = nullptr;
  PinnedBuffer* buffer_ = nullptr;
};

// Passes each call on to the device it is for.
class CudaDriver : public Driver {
 public:
  explicit CudaDriver(Allocate allocate) : allocate_(std::move(allocate)) {}

  void prepare(const DeviceStep& device_step) override {
    const runtime::DeviceGuard on_gpu(device_step.gpu);
    devices_.try_emplace(device_step.gpu, device_step.gpu, allocate_)
        .first->second.prepare(device_step);
  }

  void sum_squares(const DeviceStep& device_step) override {
    const runtime::DeviceGuard on_gpu(device_step.gpu);
    devices_.at(device_step.gpu).sum_squares(device_step);
  }

  void finalize_norm(const DeviceStep& device_step) override {
    const runtime::DeviceGuard on_gpu(device_step.gpu);
    devices_.at(device_step.gpu).finalize_norm(device_step);
  }

  void launch(const DeviceStep& device_step) override {
    const runtime::DeviceGuard on_gpu(device_step.gpu);
    devices_.at(device_step.gpu).launch(device_step);
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
