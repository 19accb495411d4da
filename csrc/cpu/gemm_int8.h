// Activations as int8 with NVFP4 tiles, on request: rows of x become, 16 columns at a time, whole
// numbers of -127..127 and the step that they count, amax / 127. Products are exact sums of
// integers; that of 16 columns is multiplied with the block scale and the step, and added to the
// row's sum in ascending order, so that bits depend on nothing but the row (gemm.h).
//
// Codes are multiplied as bytes of 0..24, twice their value + 12; a block's sum starts with what
// that adds, -12 times the sum of its x.
#pragma once
#include "cpu/gemm_codes.h"

namespace ei::EI_ISA {

// 64 columns of a row. A block that is not finite has a step that is NaN.
struct Int8Tile {
  int8_t x[kTile];  // groups of 8 in the order of kByteOrder
  int32_t start[kTile / kScaleBlock];
  float step[kTile / kScaleBlock];  // half of it: codes come doubled
};
static_assert(sizeof(Int8Tile) == kInt8TileBytes, "what rows have room for");

// Block b of a tile from the 16 values at v.
inline void quantise_block(const float* v, Int8Tile& to, int b) {
  constexpr float kLeast = 0x1p-100f;  // anything less counts as zero: 127 / amax stays finite
  uint32_t most = 0;
  for (int i = 0; i < kScaleBlock; ++i) most = std::max(most, float_bits(v[i]) & kSignless);
  const float amax = bits_float(most);
  const bool finite = most < kInfinityBits, some = finite && amax >= kLeast;
  int8_t* x = to.x + b * kScaleBlock;
  const int sum = some ? store_bytes(x, v, 127.0f / amax) : 0;
  if (!some) std::memset(x, 0, kScaleBlock);
  to.start[b] = -12 * sum;
  to.step[b] = some ? amax * (0.5f / 127.0f) : finite ? 0.0f : bits_float(0x7fc00000u);
}

// The first n columns (a multiple of 16, up to 64) of a tile from x; the others are zeros.
template <class T>
inline void quantise_tile(const T* x, int n, Int8Tile& to) {
  for (int b = 0; b < kTile / kScaleBlock; ++b) {
    alignas(64) float v[kScaleBlock] = {};
    if (b * kScaleBlock < n)
      for (int i = 0; i < kScaleBlock; i += V::kLanes)
        store(v + i, V::load(x + b * kScaleBlock + i));
    quantise_block(v, to, b);
  }
}
// Row x of k columns as `count` tiles.
template <class T>
inline void quantise_row(const T* x, int k, Int8Tile* to, int64_t count) {
  for (int64_t t = 0; t < count; ++t)
    quantise_tile(x + t * kTile, static_cast<int>(std::clamp<int64_t>(k - t * kTile, 0, kTile)),
                  to[t]);
}

// A panel of rows [0, rows) that were quantised: row(i) gives the i-th one's first tile, k(i) its
// columns. Tiles up to the widest row's end are read of all rows.
template <class Row, class Size>
inline void fill_int8_panel(Panel& p, int rows, Row row, Size k) {
  p.kind = Weights::int8;
  p.tile = DType::nvfp4;
  p.rows = rows;
  p.blocks = (rows + kMicroRows - 1) / kMicroRows;
  p.k = 0;
  for (int b = 0; b < p.blocks; ++b) {
    RowBlock& block = p.block[b];
    block.rows = std::min(kMicroRows, rows - b * kMicroRows);
    block.step = sizeof(Int8Tile);
    block.k = 0;
    for (int i = 0; i < block.rows; ++i) {
      const int r = b * kMicroRows + i;
      block.x[i] = reinterpret_cast<const char*>(static_cast<const Int8Tile*>(row(r)));
      block.k = std::max(block.k, k(r));
    }
    p.k = std::max(p.k, block.k);
  }
}

inline const Int8Tile& int8_tile(const char* x) { return *reinterpret_cast<const Int8Tile*>(x); }
// Four columns of x, from column c of the tile on.
inline uint32_t four_of(const char* x, int c) {
  uint32_t four;
  std::memcpy(&four, int8_tile(x).x + c, 4);
  return four;
}

// The first n columns of an NVFP4 tile as bytes, [16 groups of 4][64 rows][4], with block scales.
inline void expand_bytes(const char* tile, int n, char* image, float* scales) {
  constexpr int L = V::kLanes;
  uint32_t* to = reinterpret_cast<uint32_t*>(image);
  for (int k = 0; k < n; k += kNvfp4Group)
    for (int j = 0; j < kTile; j += L) {
      Bytes bytes[2];
      e2m1_bytes(nvfp4_word(tile, k, j), bytes);
      for (int s = 0; s < 2; ++s) store(to + (k / 4 + s) * kTile + j, bytes[s]);
    }
  expand_scales(tile, n, scales);
}

// totals += the sums of a block times their scales, for the lanes from r on.
template <int MR, int NJ>
inline void add_block(const Ints (&acc)[MR][NJ], const V (&scale)[NJ], const char* const* x, int b,
                      float* totals, int r, bool from_zero) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const V step = V::set(int8_tile(x[m]).step[b]);
#pragma GCC unroll 8
    for (int j = 0; j < NJ; ++j) {
      float* t = totals + m * kTile + r + j * V::kLanes;
      const V before = from_zero ? V::set(0.0f) : V::load(t);
      store(t, fma(to_floats(acc[m][j]), mul(scale[j], step), before));
    }
  }
}
template <int MR, int NJ>
inline void start_block(Ints (&acc)[MR][NJ], const char* const* x, int b) {
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; ++j) acc[m][j] = Ints::set(int8_tile(x[m]).start[b]);
}

// totals[m][lanes of this column group] (+)= sum over n columns of an expanded tile.
template <int MR, int NR>
inline void micro_bytes(const char* image, const float* scales, const char* const* x, int n,
                        float* totals, bool first) {
  constexpr int L = V::kLanes;
  const uint32_t* w = reinterpret_cast<const uint32_t*>(image);
  for (int k = 0; k < n; k += kScaleBlock) {
    const int b = k / kScaleBlock;
    Ints acc[MR][NR];
    start_block(acc, x, b);
#pragma GCC unroll 4
    for (int c = k; c < k + kScaleBlock; c += 4)
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        const Bytes bytes = Bytes::load(w + c / 4 * kTile + j * L);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) acc[m][j] = dot_bytes(acc[m][j], bytes, four_of(x[m], c));
      }
    V scale[NR];
    for (int j = 0; j < NR; ++j) scale[j] = V::load(scales + b * kTile + j * L);
    add_block(acc, scale, x, b, totals, 0, first && k == 0);
  }
}
inline void micro_bytes_any(int rows, const char* image, const float* scales, const char* const* x,
                            int n, float* totals, bool first) {
  with_rows(rows, [=](auto count) {
    constexpr int MR = count, NR = vectors_for<MR>(), L = V::kLanes;
    for (int j = 0; j < kTile; j += NR * L)
      micro_bytes<MR, NR>(image + j * 4, scales + j, x, n, totals + j, first);
  });
}

// The same straight from the codes.
template <int MR>
inline void micro_int8(const char* tile, const char* const* x, int n, float* totals, bool first,
                       const Fetch& fetch) {
  constexpr int L = V::kLanes, NJ = kCodeVectors<MR>;
  code_turns<NJ>(n, [&](int k, int r, int offset) {
    Ints acc[MR][NJ];
    start_block(acc, x, k / kScaleBlock);
    code_words<NJ>(tile, k, r, fetch, offset, [&](int j, int c, const uint32_t* words) {
      Bytes w[2];
      e2m1_bytes(words, w);
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
          acc[m][j] = dot_bytes(acc[m][j], w[s], four_of(x[m], c + 4 * s));
    });
    V scale[NJ];
#pragma GCC unroll 4
    for (int j = 0; j < NJ; ++j) scale[j] = e4m3_scales(nvfp4_scale(tile, k, r + j * L));
    add_block(acc, scale, x, k / kScaleBlock, totals, r, first && k == 0);
  });
}

}  // namespace ei::EI_ISA
