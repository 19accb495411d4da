// Panels of activation rows, and the products of up to kMicroRows of them with one tile of weights:
// the inner half of gemm.h, which says how weights lie and in which order sums are taken.
#pragma once
#include <type_traits>

#include "cpu/vec.h"

namespace ei::EI_ISA {

constexpr int kTile = 64;
constexpr int kMicroRows = 6;   // activation rows that share one pass over a tile
constexpr int kBlocks = 4;      // such blocks that pass over a tile while it is in the first cache
constexpr int kCodeBlocks = 8;  // the same for quantised tiles, which are expanded each time
constexpr int kMaxRows = 256;   // rows of one panel
constexpr int kCopyRows = 24;   // from this many rows on, a panel's rows are copied side by side
constexpr int kMaxBlocks = (kMaxRows + kMicroRows - 1) / kMicroRows;

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// f32: float tiles and activations. widen: other tiles, float activations. pairs: bf16 both, or
// codes that become bf16. int8: NVFP4 tiles, activations that were quantised (gemm_int8.h).
enum class Weights { f32, widen, pairs, int8 };

// Up to kMicroRows activation rows. Columns beyond a row's own up to `k` are zeros.
struct RowBlock {
  const char* x[kMicroRows];
  int64_t step;  // bytes from one K tile of a row to the next
  int rows, k;
};

struct Panel {
  RowBlock block[kMaxBlocks];
  int blocks = 0, rows = 0, k = 0;  // k: widest of all
  Weights kind = Weights::f32;
  DType tile = DType::f32;  // what the weight's tiles hold
  int64_t row_bytes = 0;    // from one row of tiles to the next
};

// How activations of type T meet weights of type w.
template <class T>
inline Weights kind_of(DType w) {
  if (w == DType::f32) return Weights::f32;
  return V::kPairs && sizeof(T) == 2 ? Weights::pairs : Weights::widen;
}

// Scratch bytes that fill_panel() may need for `rows` rows of K columns.
inline int64_t panel_bytes(int64_t rows, int64_t K) {
  return tiles(K) * kTile * 4 * std::min<int64_t>(rows, kMaxRows);
}

// Copies columns [c, c + n) of a row of k as T or float; columns from k on are zeros.
template <class T>
inline void copy_columns(const T* x, int c, int n, int k, bool pairs, char* to) {
  const int kept = std::clamp(k - c, 0, n);
  if (pairs) {
    std::memcpy(to, x + c, kept * 2);
    std::memset(to + kept * 2, 0, (n - kept) * 2);
    return;
  }
  float* f = reinterpret_cast<float*>(to);
  for (int i = 0; i < kept; i += V::kLanes) store(f + i, V::load(x + c + i));
  std::memset(f + kept, 0, (n - kept) * 4);
}

// Builds a panel of rows [0, rows): row(i) gives the i-th row's first element, k(i) how many of its
// columns count, a multiple of 16. Rows are copied into `scratch` ([block][K tile][row][64]) where
// their type is not the one that is multiplied, where rows of one block differ in k, and where
// there are many. share(n, f) calls f(b, ...) for b in [0, n).
template <class T, class Row, class Size, class Share>
inline void fill_panel(Panel& p, DType w, int rows, char* scratch, Row row, Size k, Share share) {
  p.kind = kind_of<T>(w);
  p.tile = w;
  p.rows = rows;
  p.blocks = (rows + kMicroRows - 1) / kMicroRows;
  p.k = 0;
  const bool pairs = p.kind == Weights::pairs;
  const bool as_they_lie = (pairs || sizeof(T) == 4) && rows < kCopyRows;
  const int row_bytes = kTile * (pairs ? 2 : 4);
  char* room[kMaxBlocks];
  bool copied = false;
  for (int b = 0; b < p.blocks; ++b) {
    RowBlock& block = p.block[b];
    const int first = b * kMicroRows;
    block.rows = std::min(kMicroRows, rows - first);
    int widest = 0, least = 1 << 30;
    for (int i = 0; i < block.rows; ++i) {
      widest = std::max(widest, k(first + i));
      least = std::min(least, k(first + i));
    }
    block.k = widest;
    p.k = std::max(p.k, widest);
    if (as_they_lie && least == widest) {
      for (int i = 0; i < block.rows; ++i)
        block.x[i] = reinterpret_cast<const char*>(row(first + i));
      block.step = row_bytes;
      room[b] = nullptr;
      continue;
    }
    for (int i = 0; i < block.rows; ++i) block.x[i] = scratch + i * row_bytes;
    block.step = block.rows * row_bytes;
    room[b] = scratch;
    copied = true;
    scratch += tiles(widest) * block.step;
  }
  if (!copied) return;
  share(p.blocks, [&](int64_t b, int = 0) {
    const RowBlock& block = p.block[b];
    if (!room[b]) return;
    for (int i = 0; i < block.rows; ++i) {
      const int r = static_cast<int>(b) * kMicroRows + i;
      char* to = room[b] + i * row_bytes;
      for (int c = 0; c < block.k; c += kTile, to += block.step)
        copy_columns(row(r), c, std::min(kTile, block.k - c), k(r), pairs, to);
    }
  });
}

// For fill_panel(): the calling thread alone.
struct Alone {
  template <class F>
  void operator()(int64_t n, F f) const {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
};

// acc[m][j] += the products of columns [begin, end) of a tile; x: each row's values at this tile.
template <int MR, int NR, Weights W>
inline void products(V (&acc)[MR][NR], const char* w, const char* const* x, int begin, int end) {
  constexpr int L = V::kLanes;
  if constexpr (W == Weights::f32) {
    const float* f = reinterpret_cast<const float*>(w);
    for (int k = begin; k < end; ++k) {
      V wv[NR];
      for (int j = 0; j < NR; ++j) wv[j] = V::load(f + k * kTile + j * L);
      for (int m = 0; m < MR; ++m) {
        const V xv = V::set(reinterpret_cast<const float*>(x[m])[k]);
        for (int j = 0; j < NR; ++j) acc[m][j] = fma(wv[j], xv, acc[m][j]);
      }
    }
  } else if constexpr (W == Weights::widen) {
    const uint32_t* b = reinterpret_cast<const uint32_t*>(w);
    for (int k = begin; k < end; k += 2) {
      for (int j = 0; j < NR; ++j) {
        V even, odd;
        load_pairs(b + (k / 2) * kTile + j * L, even, odd);
        for (int m = 0; m < MR; ++m) {
          const float* f = reinterpret_cast<const float*>(x[m]);
          acc[m][j] = fma(even, V::set(f[k]), acc[m][j]);
          acc[m][j] = fma(odd, V::set(f[k + 1]), acc[m][j]);
        }
      }
    }
  } else {
    const uint32_t* b = reinterpret_cast<const uint32_t*>(w);
    for (int k = begin / 2; k < end / 2; ++k) {
      uint32_t pair[MR];
      for (int m = 0; m < MR; ++m) std::memcpy(&pair[m], x[m] + k * 4, 4);
      for (int j = 0; j < NR; ++j)
        for (int m = 0; m < MR; ++m)
          acc[m][j] = dot_pairs(acc[m][j], b + k * kTile + j * L, pair[m]);
    }
  }
}

// totals[m][lanes of this column group] (+)= sum over n k's; MR rows, NR vectors of lanes.
template <int MR, int NR, Weights W>
inline void micro(const char* w, const char* const* x, int n, float* totals, bool first) {
  constexpr int L = V::kLanes;
  V acc[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < NR; ++j) acc[m][j] = V::set(0.0f);
  products<MR, NR, W>(acc, w, x, 0, n);
  // Unrolled, so that the sums are stored from registers.
  if (first) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) store(totals + m * kTile + j * L, acc[m][j]);
    return;
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      float* t = totals + m * kTile + j * L;
      store(t, add(V::load(t), acc[m][j]));
    }
}

// How many vectors of lanes go with MR rows: enough independent sums to hide latency.
template <int MR>
constexpr int vectors_for() {
  constexpr int L = V::kLanes, all = kTile / L;
  constexpr int want = MR == 1 ? 8 : MR == 2 ? 4 : L == 16 ? 4 : 2;
  return want < all ? want : all;
}

// Calls f(integral_constant<int, rows>) for a block's number of rows.
template <class F>
inline void with_rows(int rows, F f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    default: return f(std::integral_constant<int, 6>());
  }
}

// All 64 lanes for a block's rows.
template <Weights W>
inline void micro_any(int rows, const char* w, const char* const* x, int n, float* totals,
                      bool first) {
  with_rows(rows, [=](auto count) {
    constexpr int MR = count, NR = vectors_for<MR>(), L = V::kLanes;
    const int lane_bytes = 4;  // one float, or one pair of bf16
    for (int j = 0; j < kTile; j += NR * L)
      micro<MR, NR, W>(w + j * lane_bytes, x, n, totals + j, first);
  });
}

// Stores the first n of 64 sums.
template <class O>
inline void store_sums(const float* sums, O* out, int n) {
  int c = 0;
  for (; c + V::kLanes <= n; c += V::kLanes) store(out + c, V::load(sums + c));
  for (; c < n; ++c) from_float(sums[c], out[c]);
}

}  // namespace ei::EI_ISA
