// Matrix product core on tiled weights, shared by matmul, moe_route and moe_matmul.
//
// Weight image on the CPU: tiles of 64 rows (N) x 64 columns (K), [N/64][K/64], each contiguous.
//   bf16 tile: [32 pairs of k][64 rows][2]  (8 KiB): lane = row
//   f32  tile: [64 k][64 rows]              (16 KiB)
// A Panel holds up to kMaxRows activation rows re-packed per K tile; tile_row() multiplies them
// with one row of tiles. Order of summation: within a K tile each product is added in ascending k
// to a sum that starts at zero; tile sums are added in ascending order. It does not depend on the
// number of rows, on their widths, or on threads. (With pairs, two products at a time.)
#pragma once
#include "vec.h"

namespace ei::EI_ISA {

constexpr int kTile = 64;
constexpr int kMicroRows = 6;    // activation rows that share one pass over a tile
constexpr int kWidenRows = 12;   // from this many rows on, a bf16 tile is widened to float once
constexpr int kMaxRows = 256;    // rows of one panel
constexpr int64_t kBf16TileBytes = kTile * kTile * 2;
constexpr int64_t kF32TileBytes = kTile * kTile * 4;

inline int64_t tile_bytes(DType w) { return w == DType::f32 ? kF32TileBytes : kBf16TileBytes; }
inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// Activation rows, zero-padded to tiles, and for each how many of its columns count.
struct Panel {
  float* x;        // [K/64][rows][64] float
  uint32_t* pairs; // [K/64][rows][32] pairs of bf16; null where dot products take floats
  int rows;
  const int* k;    // [rows], multiples of 16: columns beyond are exactly zero
  float* widened;  // [64 * 64] room for one widened tile
};

// Scratch bytes of a panel with `rows` rows and K columns, and its output block.
inline int64_t panel_bytes(int64_t rows, int64_t K) {
  rows = std::min<int64_t>(rows, kMaxRows);
  return tiles(K) * rows * kTile * 6 + rows * kTile * 4 + kF32TileBytes + rows * 4 + 256;
}

// Places a panel in scratch memory; `totals` gets the room for [rows][64] sums.
inline Panel place_panel(char* scratch, int rows, int64_t K, const int* k, float** totals) {
  Panel p;
  p.rows = rows;
  p.k = k;
  p.widened = reinterpret_cast<float*>(scratch);
  *totals = p.widened + kTile * kTile;
  p.x = *totals + rows * kTile;
  p.pairs = reinterpret_cast<uint32_t*>(p.x + tiles(K) * rows * kTile);
  return p;
}

// Copies row `r` of the panel from x[0..k), zero up to the next tile boundary.
template <class T>
inline void fill_row(const Panel& p, int r, const T* x, bool pairs) {
  const int k = p.k[r];
  for (int t = 0; t * kTile < k; ++t) {
    const int n = std::min(kTile, k - t * kTile);
    if (pairs) {
      uint32_t* to = p.pairs + (static_cast<int64_t>(t) * p.rows + r) * (kTile / 2);
      if constexpr (sizeof(T) == 2) std::memcpy(to, x + t * kTile, n * 2);
      std::memset(reinterpret_cast<char*>(to) + n * 2, 0, (kTile - n) * 2);
      continue;
    }
    float* to = p.x + (static_cast<int64_t>(t) * p.rows + r) * kTile;
    for (int i = 0; i < n; i += V::kLanes) store(to + i, V::load(x + t * kTile + i));
    if (n < kTile) std::memset(to + n, 0, (kTile - n) * 4);
  }
}

// Zeroes the tiles of row r from its own k up to k_end, so that a block may run at k_end.
inline void pad_row(const Panel& p, int r, int k_end, bool pairs) {
  for (int t = static_cast<int>(tiles(p.k[r])); t * kTile < k_end; ++t) {
    if (pairs)
      std::memset(p.pairs + (static_cast<int64_t>(t) * p.rows + r) * (kTile / 2), 0, kTile * 2);
    else
      std::memset(p.x + (static_cast<int64_t>(t) * p.rows + r) * kTile, 0, kTile * 4);
  }
}

// totals[m][lanes of this column group] += sum over n k's; MR rows, NR vectors of lanes.
// F32: w is a float tile. Otherwise bf16 pairs, with x as floats or (kPairs) as bf16 pairs.
enum class Weights { f32, widen, pairs };

template <int MR, int NR, Weights W>
inline void micro(const char* w, const float* x, const uint32_t* xp, int n, float* totals) {
  constexpr int L = V::kLanes;
  V acc[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < NR; ++j) acc[m][j] = V::set(0.0f);
  if constexpr (W == Weights::f32) {
    const float* f = reinterpret_cast<const float*>(w);
    for (int k = 0; k < n; ++k) {
      V wv[NR];
      for (int j = 0; j < NR; ++j) wv[j] = V::load(f + k * kTile + j * L);
      for (int m = 0; m < MR; ++m) {
        const V xv = V::set(x[m * kTile + k]);
        for (int j = 0; j < NR; ++j) acc[m][j] = fma(wv[j], xv, acc[m][j]);
      }
    }
  } else if constexpr (W == Weights::widen) {
    const uint32_t* b = reinterpret_cast<const uint32_t*>(w);
    for (int k = 0; k < n; k += 2) {
      for (int j = 0; j < NR; ++j) {
        V even, odd;
        load_pairs(b + (k / 2) * kTile + j * L, even, odd);
        for (int m = 0; m < MR; ++m) {
          acc[m][j] = fma(even, V::set(x[m * kTile + k]), acc[m][j]);
          acc[m][j] = fma(odd, V::set(x[m * kTile + k + 1]), acc[m][j]);
        }
      }
    }
  } else {
    const uint32_t* b = reinterpret_cast<const uint32_t*>(w);
    for (int k = 0; k < n / 2; ++k)
      for (int j = 0; j < NR; ++j)
        for (int m = 0; m < MR; ++m)
          acc[m][j] = dot_pairs(acc[m][j], b + k * kTile + j * L, xp[m * (kTile / 2) + k]);
  }
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < NR; ++j) {
      float* t = totals + m * kTile + j * L;
      store(t, add(V::load(t), acc[m][j]));
    }
}

// All 64 lanes for MR rows, NR vectors at a time (enough independent sums to hide latency).
template <int MR, Weights W>
inline void micro_rows(const char* w, const float* x, const uint32_t* xp, int n, float* totals) {
  constexpr int L = V::kLanes, kVectors = kTile / L;
  constexpr int want = MR == 1 ? 8 : MR == 2 ? 4 : L == 16 ? 4 : 2;
  constexpr int NR = want < kVectors ? want : kVectors;
  const int lane_bytes = 4;  // one float, or one pair of bf16
  for (int j = 0; j < kTile; j += NR * L) micro<MR, NR, W>(w + j * lane_bytes, x, xp, n, totals + j);
}

template <Weights W>
inline void micro_any(int rows, const char* w, const float* x, const uint32_t* xp, int n,
                      float* totals) {
  switch (rows) {
    case 1: return micro_rows<1, W>(w, x, xp, n, totals);
    case 2: return micro_rows<2, W>(w, x, xp, n, totals);
    case 3: return micro_rows<3, W>(w, x, xp, n, totals);
    case 4: return micro_rows<4, W>(w, x, xp, n, totals);
    case 5: return micro_rows<5, W>(w, x, xp, n, totals);
    default: return micro_rows<6, W>(w, x, xp, n, totals);
  }
}

// Float image of the first n columns of a bf16 tile.
inline void widen_tile(const char* w, int n, float* out) {
  const uint32_t* b = reinterpret_cast<const uint32_t*>(w);
  for (int k = 0; k < n; k += 2)
    for (int j = 0; j < kTile; j += V::kLanes) {
      V even, odd;
      load_pairs(b + (k / 2) * kTile + j, even, odd);
      store(out + k * kTile + j, even);
      store(out + (k + 1) * kTile + j, odd);
    }
}

// totals [rows][64] = panel x (one row of weight tiles)^T, for the panel's rows [0, rows).
// Each block of kMicroRows rows runs to the widest k among its own rows. Rows whose pad_row()
// reaches that k contribute exact zeros beyond their own.
inline void tile_row(const Panel& p, const char* image_row, DType wtype, bool pairs,
                     float* totals) {
  std::memset(totals, 0, static_cast<size_t>(p.rows) * kTile * 4);
  int k_max = 0;
  for (int r = 0; r < p.rows; ++r) k_max = std::max(k_max, p.k[r]);
  const int64_t bytes = tile_bytes(wtype);
  const bool widen = !pairs && wtype == DType::bf16 && p.rows >= kWidenRows;
  for (int t = 0; t * kTile < k_max; ++t) {
    const char* w = image_row + t * bytes;
    if (widen) widen_tile(w, std::min(kTile, k_max - t * kTile), p.widened);
    for (int r = 0; r < p.rows; r += kMicroRows) {
      const int rows = std::min(kMicroRows, p.rows - r);
      int k_block = 0;
      for (int i = 0; i < rows; ++i) k_block = std::max(k_block, p.k[r + i]);
      const int n = std::min(kTile, k_block - t * kTile);
      if (n <= 0) continue;
      const int64_t at = static_cast<int64_t>(t) * p.rows + r;
      const float* x = p.x + at * kTile;
      const uint32_t* xp = p.pairs + at * (kTile / 2);
      float* out = totals + r * kTile;
      if (pairs)
        micro_any<Weights::pairs>(rows, w, x, xp, n, out);
      else if (wtype == DType::f32)
        micro_any<Weights::f32>(rows, w, x, xp, n, out);
      else if (widen)
        micro_any<Weights::f32>(rows, reinterpret_cast<const char*>(p.widened), x, xp, n, out);
      else
        micro_any<Weights::widen>(rows, w, x, xp, n, out);
    }
  }
}

// Whether activations of type T and weights of type w multiply as pairs of bf16.
template <class T>
inline bool use_pairs(DType w) {
  return V::kPairs && sizeof(T) == 2 && w == DType::bf16;
}

}  // namespace ei::EI_ISA
