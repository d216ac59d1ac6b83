// Tests of csrc/core and of both drivers without Python and torch; the kernels of the CUDA driver
// are emulated. Run as `test_core SUITE`, which exits with 0 if every CHECK of the suite held.
// tests/cpp/test_cpp.py compiles and runs it.
#include "check.h"

#include <cstring>

void test_dtypes();
void test_codes();
void test_rules();
void test_step_scalars();
void test_power();
void test_branch_free();
void test_chunks();
void test_layout();
void test_overlap();
void test_norm();
void test_driver();
void test_grid();
void test_usual();
void test_host_mirror();
void test_table();
void test_gpu();
void test_counters();
void test_huge();

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } suites[] = {{"dtypes", test_dtypes},     {"codes", test_codes},
                {"rules", test_rules},       {"step_scalars", test_step_scalars},
                {"power", test_power},       {"branch_free", test_branch_free},
                {"chunks", test_chunks},     {"layout", test_layout},
                {"overlap", test_overlap},   {"norm", test_norm},
                {"driver", test_driver},     {"grid", test_grid},
                {"usual", test_usual},       {"host_mirror", test_host_mirror},
                {"table", test_table},       {"gpu", test_gpu},
                {"counters", test_counters}, {"huge", test_huge}};
  for (const auto& suite : suites) {
    if (argc != 2 || std::strcmp(argv[1], suite.name) != 0) continue;
    suite.run();
    std::printf("%s: %d failed\n", suite.name, g_failures);
    return g_failures == 0 ? 0 : 1;
  }
  std::printf("usage: test_core SUITE\n");
  return 2;
}
