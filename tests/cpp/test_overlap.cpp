// find_overlap against the definition of an overlap: two regions have the same byte.
#include "check.h"

#include "core/overlap.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <vector>

using namespace fusedopt;

namespace {

constexpr uintptr_t kBase = uintptr_t{1} << 40;  // no memory is read

// Regions and the dims they point to.
class Regions {
 public:
  void add_dense(uintptr_t at, int64_t item, int64_t count) {
    regions_.push_back({kBase + at, item, count * item, nullptr, kParam, next_++});
  }
  void add_strided(uintptr_t at, int64_t item, const Dims& dims) {
    dims_.push_back(dims);
    const Dims* const kept = &dims_.back();
    regions_.push_back({kBase + at, item, extent(dims, kParam) * item, kept, kParam, next_++});
  }

  std::optional<Owners> find() const {
    std::vector<Region> sorted = regions_;
    return find_overlap(sorted);
  }

  // Whether these owners share a byte; of an owner and itself, whether it has one byte twice.
  bool device_step(int64_t a, int64_t b) const {
    std::map<uintptr_t, int> bytes;
    bool found = false;
    for (const Region& region : regions_) {
      if (region.owner != a && region.owner != b) continue;
      for_each_element(region, [&](int64_t at) {
        for (int64_t byte = 0; byte < region.item; ++byte)
          found = ++bytes[region.base + static_cast<uintptr_t>(at + byte)] > 1 || found;
      });
    }
    return found;
  }

  // Marks against a set of bytes, for every pair of regions.
  void check_marks() const {
    for (const Region& a : regions_)
      for (const Region& b : regions_) {
        Marks marks(std::min(a.base, b.base), std::max(end_of(a), end_of(b)));
        marks.add(a);
        std::set<uintptr_t> bytes;
        for_each_element(a, [&](int64_t at) {
          for (int64_t byte = 0; byte < a.item; ++byte)
            bytes.insert(a.base + static_cast<uintptr_t>(at + byte));
        });
        bool meets = false;
        for_each_element(b, [&](int64_t at) {
          for (int64_t byte = 0; byte < b.item; ++byte)
            meets = meets || bytes.count(b.base + static_cast<uintptr_t>(at + byte)) > 0;
        });
        CHECK(marks.meets(b) == meets);
      }
  }

  bool any_device_step() const {
    for (int64_t a = 0; a < next_; ++a)
      for (int64_t b = 0; b <= a; ++b)
        if (device_step(a, b)) return true;
    return false;
  }

 private:
  std::deque<Dims> dims_;  // keeps addresses
  std::vector<Region> regions_;
  int64_t next_ = 0;
};

void check_found(const Regions& regions, int64_t a, int64_t b) {
  const auto found = regions.find();
  CHECK(found.has_value());
  if (found) CHECK((*found == Owners(a, b) || *found == Owners(b, a)));
}

void test_dense_regions() {
  CHECK(!Regions().find());
  Regions regions;
  regions.add_dense(64, 4, 16);
  regions.add_dense(0, 4, 16);    // ends where the first begins
  regions.add_dense(128, 2, 32);  // begins where the first ends
  CHECK(!regions.find());
  regions.add_dense(191, 1, 1);  // the last byte of the third
  check_found(regions, 2, 3);
}

void test_column_slices() {
  const Dims keys = {{6, {40}}, {4, {1}}};
  Regions apart;
  for (const int64_t key : {0, 4, 36, 20}) apart.add_strided(key * 4, 4, keys);
  CHECK(!apart.find());
  apart.add_strided(7 * 4, 4, keys);  // columns 7 to 10; 4 to 7 are taken
  check_found(apart, 1, 4);
}

void test_dense_region_in_a_gap() {
  const Dims keys = {{6, {40}}, {4, {1}}};
  Regions regions;
  regions.add_strided(0, 4, keys);
  regions.add_dense(16, 4, 36);  // from behind the first row to the second
  CHECK(!regions.find());
  Regions longer;
  longer.add_strided(0, 4, keys);
  longer.add_dense(16, 4, 37);
  check_found(longer, 0, 1);
}

void test_expanded_tensor() {
  Regions regions;
  regions.add_dense(0, 4, 9);
  regions.add_strided(400, 4, {{3, {0}}, {5, {1}}});
  check_found(regions, 1, 1);
  Regions folded;  // rows of five that start every three elements
  folded.add_strided(0, 4, {{4, {3}}, {5, {1}}});
  check_found(folded, 0, 0);
  Regions sparse;  // strides alone do not tell that 2 i + 3 j are distinct for i, j < 2
  sparse.add_strided(0, 4, {{2, {3}}, {2, {2}}});
  CHECK(!sparse.find());
}

// A dim of one element has any stride: what is known to be distinct is not marked byte for byte.
void test_dims_of_one_element() {
  const Dims rows = {{1000, {1}}, {1, {0}}}, expanded = {{1, {1}}, {4, {0}}};
  CHECK(has_distinct_elements({0, 4, 4000, &rows, 0, 0}));
  CHECK(!has_distinct_elements({0, 4, 4, &expanded, 0, 0}));
}

void test_clusters() {
  const Dims keys = {{6, {40}}, {4, {1}}};
  Regions regions;
  for (const int64_t at : {0, 1600, 1616, 4000}) regions.add_strided(at, 4, keys);
  CHECK(!regions.find());
  regions.add_strided(1600 + 5 * 160 + 2, 2, {});  // one element in the last row of the second
  check_found(regions, 1, 4);
}

void test_random_regions() {
  std::mt19937 random(3);
  int overlapping = 0;
  for (int run = 0; run < 500; ++run) {
    Regions regions;
    for (uint32_t i = 0; i < 1 + random() % 4; ++i) {
      const int64_t item = int64_t{1} << (random() % 3);
      if (random() % 3 == 0) {
        regions.add_dense(random() % 300, item, 1 + random() % 20);
        continue;
      }
      Dims dims(random() % 3);
      for (Dim& dim : dims)
        dim = {2 + static_cast<int64_t>(random() % 3), {static_cast<int64_t>(random() % 25)}};
      regions.add_strided(random() % 300, item, dims);
    }
    const auto found = regions.find();
    CHECK(found.has_value() == regions.any_device_step());
    if (found) CHECK(regions.device_step(found->first, found->second));
    regions.check_marks();
    overlapping += found.has_value();
  }
  CHECK(overlapping > 100 && overlapping < 400);  // otherwise the test would show little
}

}  // namespace

void test_overlap() {
  test_dense_regions();
  test_column_slices();
  test_dense_region_in_a_gap();
  test_expanded_tensor();
  test_dims_of_one_element();
  test_clusters();
  test_random_regions();
}
