// What the ops over packed sequences share: cu_seqlens [S+1] i32 says where each sequence's tokens
// start in [T, ...]; slots [S] i32 says which row of the state pool each one owns (-1: padding).
#pragma once
#include <algorithm>
#include <vector>

#include "host/check.h"

namespace ei {

// Checks shapes and dtypes of the index arrays, binding S. Where the values can be read and the
// call is not being recorded (`live`), checks these too: cu_seqlens starts at 0, never falls and
// ends within [0, T]; slots are in [-1, slot_count) and no two sequences share one.
inline void check_slots(Checker& check, const Tensor& slots, int64_t slot_count, bool live) {
  check(slots, "slots").dtype({DType::i32}).shape({"S"}).contiguous();
  if (!live || slots.cuda) return;
  const auto* v = slots.ptr<int32_t>();
  for (int64_t s = 0; s < slots.shape[0]; ++s)
    if (v[s] < -1 || v[s] >= slot_count)
      check.fail("slots", "hold -1 or indices in [0, " + std::to_string(slot_count) + ")",
                 std::to_string(v[s]) + " at sequence " + std::to_string(s));
  std::vector<int32_t> sorted(v, v + slots.shape[0]);
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    if (sorted[i] >= 0 && sorted[i] == sorted[i - 1])
      check.fail("slots", "differ between sequences", std::to_string(sorted[i]) + " twice");
}

inline void check_segments(Checker& check, const Tensor& cu_seqlens, bool live) {
  const int64_t S = check["S"], T = check["T"];
  check(cu_seqlens, "cu_seqlens").dtype({DType::i32}).shape({S + 1}).contiguous();
  if (!live || cu_seqlens.cuda) return;
  const auto* v = cu_seqlens.ptr<int32_t>();
  if (v[0] != 0) check.fail("cu_seqlens", "start at 0", std::to_string(v[0]));
  for (int64_t s = 0; s < S; ++s)
    if (v[s + 1] < v[s] || v[s + 1] > T)
      check.fail("cu_seqlens", "rise within [0, " + std::to_string(T) + "], the number of tokens",
                 std::to_string(v[s]) + " then " + std::to_string(v[s + 1]) + " at sequence " +
                     std::to_string(s));
}

// A pool of per-sequence state: any stride between slots, dense inside one.
inline void check_pool(Checker& check, const Tensor& pool, const char* name) {
  if (pool.numel() == 0) return;
  int64_t dense = 1;
  for (int i = pool.ndim - 1; i > 0; --i) {
    if (pool.shape[i] > 1 && pool.stride[i] != dense)
      check.fail(name, "be dense inside each slot",
                 "stride " + std::to_string(pool.stride[i]) + " in dimension " + std::to_string(i) +
                     " of " + pool.describe());
    dense *= pool.shape[i];
  }
}

}  // namespace ei
