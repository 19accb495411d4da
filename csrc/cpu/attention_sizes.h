// Scratch of the attention kernels, in floats, for whatever instruction set runs.
#pragma once
#include <cstdint>

namespace ei {

constexpr int64_t kMostLanes = 16;  // floats in the widest vector

// One block of `rows` query rows and the page it attends to (AttentionBlock).
inline int64_t attention_floats(int64_t rows, int64_t K) {
  const int64_t lanes = (rows + kMostLanes - 1) / kMostLanes * kMostLanes;
  return 2 * 64 * K + 64 * 3 * kMostLanes + 2 * lanes * K + 3 * lanes;
}

// Tokens of one block of prefill whose KV heads have `group` query heads each: a power of two that
// divides a page, for up to 128 rows.
inline int64_t prefill_tokens(int64_t group) {
  int64_t tokens = 64;
  while (tokens > 1 && tokens * group > 128) tokens /= 2;
  return tokens;
}

// One partial result: o, m and l of a block.
inline int64_t partial_floats(int64_t rows, int64_t K) {
  return (rows + kMostLanes - 1) / kMostLanes * kMostLanes * (K + 2);
}

}  // namespace ei
