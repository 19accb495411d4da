// Indices that CPU kernels find in tables: each is read once, used only within its bounds, and
// reported by name where it is outside. The checks of a call look at the same values, but those of
// a recorded call come later, and another thread may write while an op runs.
#pragma once
#include "host/pool.h"
#include "host/tensor.h"

namespace ei::EI_ISA {

inline int32_t read_once(const Tensor& table, int64_t i) {
  return *static_cast<const volatile int32_t*>(table.ptr<int32_t>() + i);
}

// Whether low <= value <= high; reports `value` of the table `name`, found at `unit` number `at`.
inline bool inside(Pool& pool, const char* op, const char* name, int64_t value, int64_t low,
                   int64_t high, const char* unit, int64_t at) {
  if (value >= low && value <= high) return true;
  pool.fail_index(op, name, value, low, high, unit, at);
  return false;
}

// Active sizes by width: of row r, sizes[rows[r]], or `largest` without `rows`. A size is a
// multiple of `grain` or `largest`.
struct ActiveSizes {
  const char* op;
  const Tensor& rows;
  const char* rows_name;
  const Tensor& sizes;
  const char* name;
  int64_t largest;
  int grain = 1;
  const char* unit = "row";

  // The size of row r; -1 after a report.
  int at(Pool& pool, int64_t r) const {
    if (!rows) return static_cast<int>(largest);
    const int32_t width = read_once(rows, r);
    if (!inside(pool, op, rows_name, width, 0, sizes.shape[0] - 1, unit, r)) return -1;
    const int32_t n = read_once(sizes, width);
    if (!inside(pool, op, name, n, 0, largest, unit, r)) return -1;
    if (n % grain == 0 || n == largest) return n;
    pool.fail_grain(op, name, n, grain, unit, r);
    return -1;
  }
};

// The tokens of a sequence: cu_seqlens[s] to cu_seqlens[s + 1].
struct Span {
  int64_t begin, end;
};

// Those of sequence s among `tokens`; empty after a report.
inline Span span_of(Pool& pool, const char* op, const Tensor& cu_seqlens, int64_t s,
                    int64_t tokens) {
  const int32_t begin = read_once(cu_seqlens, s), end = read_once(cu_seqlens, s + 1);
  if (inside(pool, op, "cu_seqlens", begin, 0, tokens, "sequence", s) &&
      inside(pool, op, "cu_seqlens", end, begin, tokens, "the end of sequence", s))
    return {begin, end};
  return {0, 0};
}

}  // namespace ei::EI_ISA
