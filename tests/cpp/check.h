// The one assertion of these tests.
#pragma once

#include <cstdio>

// CHECK(condition) reports a condition that is false, counts it, and goes on.
inline int g_failures = 0;

inline void check(bool holds, const char* condition, const char* file, int line) {
  if (holds) return;
  if (++g_failures <= 20) std::printf("%s:%d: failed: %s\n", file, line, condition);
}

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
