// Tensors of more than 2^31 elements: single blocks of the update kernel, in memory that is
// reserved and for the most part never touched.
#include "check.h"
#include "problem.h"

#include "cuda/grad_norm.h"
#include "cuda/grid.h"
#include "cuda/runtime.h"
#include "cuda/update.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <vector>

using namespace fusedopt;
using namespace fusedopt::cuda;

namespace {

constexpr int64_t kTwo30 = int64_t{1} << 30;

// Reserved memory for an operand. It is zero where nothing was written.
class Reserved {
 public:
  Reserved(DType dtype, int64_t elements) : dtype_(dtype), bytes_(elements * item_size(dtype)) {
    data_ = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ != MAP_FAILED) return;
    std::perror("mmap without reserving memory");
    std::exit(1);
  }
  ~Reserved() { munmap(data_, static_cast<size_t>(bytes_)); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;

  void* place(int64_t at) const { return static_cast<char*>(data_) + at * item_size(dtype_); }

 private:
  DType dtype_;
  int64_t bytes_;
  void* data_;
};

// A tensor of which single chunks are updated.
class Huge {
 public:
  explicit Huge(const Problem& problem) : problem_(problem), starts_(plan_grid({problem.numel})) {
    for (int k = 0; k < kMaxOperands; ++k) {
      const DType dtype = dtype_of(k);
      update_.formats.dtypes[k] = dtype;
      memory_.emplace_back();
      if (dtype == DType::kAbsent) continue;
      const int64_t elements = problem.dims.empty() ? problem.numel : extent(problem.dims, k);
      memory_.back() = std::make_unique<Reserved>(dtype, elements + shift(k));
      update_.data[k] = place(k, 0);
    }
    update_.formats.stochastic = static_cast<uint8_t>(problem.stochastic);
    update_.numel = problem.numel;
    update_.layout = problem.dims.empty() ? kDense : 0;
    update_.rule = problem.rule;
    update_.variant = static_cast<uint8_t>(problem.variant);
    update_.device = kFirstGpu;
  }

  // Runs the block that has this element, and compares all elements of its chunk with what the rule
  // gives. Those beside the chunk must stay as they are.
  void check_chunk_of(int64_t element) {
    const auto after = std::upper_bound(
        starts_.begin(), starts_.end() - 1, element,
        [](int64_t wanted, const ChunkStart& start) { return wanted < start.element; });
    const ChunkStart* const chunk = &*after - 1;
    const int64_t begin = chunk[0].element;
    const int64_t end = chunk[1].update > 0 ? problem_.numel : chunk[1].element;
    CHECK(begin <= element && element < end);

    const int64_t first = std::max<int64_t>(begin - kGuard, 0);
    const int64_t last = std::min(end + kGuard, problem_.numel);
    write(first, make_buffers(part(first, last)));
    const auto before = read(first, begin), behind = read(end, last);
    auto expected = read(begin, end);
    update_one_by_one(part(begin, end), expected);
    run(chunk);
    CHECK(read(begin, end) == expected);
    CHECK(read(first, begin) == before && read(end, last) == behind);
  }

 private:
  DType dtype_of(int operand) const { return problem_.dtypes[static_cast<size_t>(operand)]; }
  int64_t shift(int operand) const { return problem_.shifts[static_cast<size_t>(operand)]; }

  void* place(int operand, int64_t element) const {
    return memory_[static_cast<size_t>(operand)]->place(shift(operand) +
                                                        offset_of(problem_, element, operand));
  }

  // A problem of elements [begin, end) alone.
  Problem part(int64_t begin, int64_t end) const {
    Problem part = problem_;
    part.dims.clear();
    part.shifts = {};
    part.guard = 0;
    part.numel = end - begin;
    part.first_number = begin;
    return part;
  }

  // Calls `f` with a buffer's item of each element from `first` and its place in the tensor.
  template <class F>
  void for_each_item(int64_t first, std::vector<Buffer>& buffers, const F& f) const {
    for (int k = 0; k < kMaxOperands; ++k) {
      if (!problem_.has(k)) continue;
      std::vector<uint8_t>& bytes = buffers[static_cast<size_t>(k)].bytes();
      const auto item = static_cast<size_t>(item_size(dtype_of(k)));
      for (size_t i = 0; i * item < bytes.size(); ++i)
        f(&bytes[i * item], place(k, first + static_cast<int64_t>(i)), item);
    }
  }

  void write(int64_t first, std::vector<Buffer> buffers) {
    for_each_item(first, buffers,
                  [](const void* from, void* to, size_t size) { std::memcpy(to, from, size); });
  }

  std::vector<Buffer> read(int64_t begin, int64_t end) const {
    std::vector<Buffer> buffers = make_buffers(part(begin, end));
    for_each_item(begin, buffers,
                  [](void* to, const void* from, size_t size) { std::memcpy(to, from, size); });
    return buffers;
  }

  void run(const ChunkStart* chunk) {
    const Layout layout = {problem_.dims.data(), static_cast<int>(problem_.dims.size())};
    UpdateCall call = {};
    call.key = launch_key_of(update_);
    call.updates = &update_;
    call.chunks = chunk;
    call.num_chunks = 1;
    call.layouts = &layout;
    call.few_scalars = &problem_.scalars;
    call.num_few_scalars = 1;
    runtime::update(call);
  }

  Problem problem_;
  std::vector<ChunkStart> starts_;
  std::vector<std::unique_ptr<Reserved>> memory_;
  ParamUpdate update_ = {};
};

void check_chunks(const Problem& problem, std::initializer_list<int64_t> elements) {
  Huge huge(problem);
  for (const int64_t element : elements) huge.check_chunk_of(element);
}

Problem dense(int kind, DType dtype, int64_t numel) {
  Problem problem = in_format(problems_of(kind).back(), dtype);
  problem.numel = numel;
  return problem;
}

void test_dense() {
  const int64_t numel = 2 * kTwo30 + 4096 + 3;
  const auto chunks = {int64_t{0}, 2 * kTwo30 - 1, 2 * kTwo30, numel - 1};
  check_chunks(dense(kIdOf<Sgd>, DType::kBFloat16, numel), chunks);
  check_chunks(dense(kIdOf<Adam>, DType::kFloat32, numel), chunks);
  check_chunks(dense(kKindOf<Rmsprop>, DType::kBFloat16, numel), chunks);

  Problem mixture = dense(kIdOf<Sgd>, DType::kBFloat16, numel);
  mixture.dtypes[kFirstState] = DType::kFloat32;
  mixture.dtypes[kMaster] = DType::kRemainder;
  mixture.dtypes[kEma] = DType::kFloat32;
  check_chunks(mixture, chunks);

  Problem misaligned = dense(kIdOf<Sgd>, DType::kFloat32, numel);
  misaligned.shifts[kGrad] = 1;
  check_chunks(misaligned, chunks);
  misaligned.shifts[kParam] = 1;
  check_chunks(misaligned, chunks);

  // Draws depend on all bits of an element's number, also on those beyond 32 and 33.
  check_chunks(rounded_stochastically(dense(kIdOf<Sgd>, DType::kBFloat16, 8 * kTwo30 + 5), ~0u),
               {0, 4 * kTwo30 - 1, 4 * kTwo30, 8 * kTwo30 - 1, 8 * kTwo30});
}

// The largest offset of an operand is beyond 2^31, or the number of elements is.
void test_strided() {
  const Problem problem = in_format(problems_of(kIdOf<Sgd>).back(), DType::kBFloat16);
  const Dims transposed = {{3, {kTwo30, 1, kTwo30}}, {kTwo30, {1, 3, 1}}};
  check_chunks(with_dims(problem, transposed), {0, 2 * kTwo30 - 1, 2 * kTwo30, 3 * kTwo30 - 1});
  const Dims apart = {{5, {kTwo30, 3, 700}}, {3, {1, 1, 200}}};
  check_chunks(with_dims(problem, apart), {0});
  // The size of a dim must not be cut to 32 bits, not in the first chunk either.
  const Dims expanded = {{4 * kTwo30 + 5, {1, 0, 1}}};
  check_chunks(with_dims(problem, expanded), {0, 2 * kTwo30, 4 * kTwo30, 4 * kTwo30 + 4});
}

// Of a table that has more rows than 32 bits can count, only those that are listed are walked.
void test_rows() {
  float param[4] = {10, 11, 12, 13}, grad[4] = {0, 1, 2, 3};
  const int64_t rows[4] = {3, 2, 1, 0};
  for (const int64_t more : {0, 1, 2}) {
    const Dim dims[2] = {{4 * kTwo30 + more, {1, 1, 1, 1, 1, 1, 1, 1}}, {1, {}}};
    const Layout layout = {dims, 2, rows, 4};
    ParamUpdate update = {};
    update.data[kParam] = param;
    update.data[kGrad] = grad;
    update.numel = 4;
    update.formats.dtypes[kParam] = update.formats.dtypes[kGrad] = DType::kFloat32;
    for (int64_t i = 0; i < 4; ++i) {
      CHECK(find_grad(layout, i, /*is_small=*/true) == i);
      Singles<float, 1, PlainStep> single(&update, &layout);
      single.place(0, i);
      Pack<float, 1> value;
      single.load<float, false>(kParam, value);
      CHECK(value[0] == param[rows[i]]);
    }
  }
}

}  // namespace

void test_huge() {
  test_dense();
  test_strided();
  test_rows();
}
