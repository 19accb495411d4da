// Quantised tiles of weights: how they lie on the CPU, and their products with activations.
//
//   FP8 tile:   [16 groups of 4 columns][64 rows] words (4 KiB); the bytes of a word are the codes
//               of columns 0, 2, 1, 3, so that a vector of words gives pairs of columns.
//   NVFP4 tile: 4 groups of 16 rows, each [8 groups of 8 columns][16 rows] words (512 B); the low
//               half of a word has the codes of the even columns, the high half those of the odd
//               ones, ascending from the lowest four bits; then [4 blocks of 16 columns][16 rows]
//               block scales (64 B). One row of x reads it from the first to the last byte.
//
// Codes become bf16 or float exactly. What is left to multiply with, the tensor's scale and
// kBlockFactor, is applied to the finished sums.
#pragma once
#include "gemm_micro.h"

namespace ei::EI_ISA {

constexpr int kNvfp4Group = 8, kFp8Group = 4;  // columns per word
constexpr int kRowGroup = 16;                  // rows of an NVFP4 tile that lie together
constexpr int kGroupBytes = kRowGroup * kTile / 2 + kRowGroup * kTile / kScaleBlock;

// The word of row r and columns c to c + 7 of an NVFP4 tile, and the scale of that row's block.
inline const uint32_t* nvfp4_word(const char* tile, int c, int r) {
  return reinterpret_cast<const uint32_t*>(tile + r / kRowGroup * kGroupBytes) +
         c / kNvfp4Group * kRowGroup + r % kRowGroup;
}
inline const uint8_t* nvfp4_scale(const char* tile, int c, int r) {
  return reinterpret_cast<const uint8_t*>(tile) + r / kRowGroup * kGroupBytes +
         kRowGroup * kTile / 2 + c / kScaleBlock * kRowGroup + r % kRowGroup;
}

// Bits that column c (of a group) starts at in its word.
constexpr int nvfp4_shift(int c) { return c % 2 * 16 + c / 2 * 4; }
constexpr int fp8_shift(int c) { return c % 2 * 16 + c / 2 * 8; }

template <DType Tile>
inline void unpack(const uint32_t* words, V* out) {
  Tile == DType::nvfp4 ? e2m1_floats(words, out) : e4m3_floats(words, out);
}

// The first n columns of a tile as a bf16 tile (pairs) or a float tile, with the block scales.
template <Weights W, DType Tile>
inline void expand_tile(const char* tile, int n, char* image, float* scales) {
  constexpr int L = V::kLanes, group = Tile == DType::nvfp4 ? kNvfp4Group : kFp8Group;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(tile);
  for (int k = 0; k < n; k += group)
    for (int j = 0; j < kTile; j += L) {
      const uint32_t* from =
          Tile == DType::nvfp4 ? nvfp4_word(tile, k, j) : words + k / group * kTile + j;
      if constexpr (W == Weights::pairs) {
        uint32_t* to = reinterpret_cast<uint32_t*>(image) + k / 2 * kTile + j;
        Pairs pairs[group / 2];
        Tile == DType::nvfp4 ? e2m1_pairs(from, pairs) : e4m3_pairs(from, pairs);
        for (int s = 0; s < group / 2; ++s) store(to + s * kTile, pairs[s]);
      } else {
        float* to = reinterpret_cast<float*>(image) + k * kTile + j;
        V values[group];
        unpack<Tile>(from, values);
        for (int s = 0; s < group; ++s) store(to + s * kTile, values[s]);
      }
    }
  if (Tile == DType::nvfp4)
    for (int k = 0; k < n; k += kScaleBlock)
      for (int j = 0; j < kTile; j += L)
        store(scales + k / kScaleBlock * kTile + j, e4m3_scales(nvfp4_scale(tile, k, j)));
}

// As micro(), for an expanded NVFP4 tile: the sum of a block of columns starts at zero and is added
// times its scale.
template <int MR, int NR, Weights W>
inline void micro_blocks(const char* w, const float* scales, const char* const* x, int n,
                         float* totals, bool first) {
  constexpr int L = V::kLanes;
  for (int k = 0; k < n; k += kScaleBlock) {
    V acc[MR][NR];
    for (int m = 0; m < MR; ++m)
      for (int j = 0; j < NR; ++j) acc[m][j] = V::set(0.0f);
    products<MR, NR, W>(acc, w, x, k, k + kScaleBlock);
    const float* scale = scales + k / kScaleBlock * kTile;
    const bool from_zero = first && k == 0;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        float* t = totals + m * kTile + j * L;
        const V before = from_zero ? V::set(0.0f) : V::load(t);
        store(t, fma(acc[m][j], V::load(scale + j * L), before));
      }
  }
}

template <Weights W>
inline void micro_scaled(int rows, const char* w, const float* scales, const char* const* x, int n,
                         float* totals, bool first) {
  with_rows(rows, [=](auto count) {
    constexpr int MR = count, NR = vectors_for<MR>(), L = V::kLanes;
    for (int j = 0; j < kTile; j += NR * L)
      micro_blocks<MR, NR, W>(w + j * 4, scales + j, x, n, totals + j, first);
  });
}

// acc[m] += the products of the 16 columns from k on of kLanes rows, straight from their codes.
template <int MR, Weights W>
inline void code_products(V (&acc)[MR], const uint32_t* words, const char* const* x, int k) {
#pragma GCC unroll 2
  for (int half = 0; half < kScaleBlock; half += kNvfp4Group) {
    const uint32_t* from = words + half / kNvfp4Group * kRowGroup;
    if constexpr (W == Weights::pairs) {
      Pairs w[kNvfp4Group / 2];
      e2m1_pairs(from, w);
#pragma GCC unroll 4
      for (int s = 0; s < kNvfp4Group / 2; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          uint32_t pair;
          std::memcpy(&pair, x[m] + (k + half + 2 * s) * 2, 4);
          acc[m] = dot_pairs(acc[m], w[s], pair);
        }
    } else {
      V w[kNvfp4Group];
      e2m1_floats(from, w);
#pragma GCC unroll 8
      for (int s = 0; s < kNvfp4Group; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m)
          acc[m] = fma(w[s], V::set(reinterpret_cast<const float*>(x[m])[k + half + s]), acc[m]);
    }
  }
}

// Tiles to fetch while another is multiplied: `far` from memory into the second cache, `near` from
// there into the first. With so little arithmetic a byte the hardware's own guess comes late, and
// the first cache alone can wait for too few lines at once to hide the way to memory.
struct Fetch {
  const char *near, *far;
};
constexpr int kNear = 2, kFar = 12;  // tiles before they are needed

// The tile that is read `distance` tiles after tile t of a row of tiles, of which `count` are read;
// tile t itself from `end` on.
inline const char* tile_ahead(const char* row, int64_t row_bytes, int t, int distance, int count,
                              int64_t bytes, const char* end) {
  const int at = t + distance;
  const char* ahead = row + at / count * row_bytes + at % count * bytes;
  return ahead < end ? ahead : row + t * bytes;
}

// Some lines of 64 bytes of both tiles.
template <int Lines>
inline void fetch_lines(const Fetch& fetch, int offset) {
#pragma GCC unroll 4
  for (int line = 0; line < Lines; ++line) {
    __builtin_prefetch(fetch.near + offset + line * 64, 0, 3);
    __builtin_prefetch(fetch.far + offset + line * 64, 0, 2);
  }
}

// totals[m][64 lanes] (+)= sum over n columns of an NVFP4 tile, in the order of micro_blocks().
template <int MR, Weights W>
inline void micro_codes(const char* tile, const char* const* x, int n, float* totals, bool first,
                        const Fetch& fetch) {
  constexpr int L = V::kLanes;
  for (int j = 0; j < kTile; j += L) {
    const int group = j / kRowGroup * kGroupBytes;
    V total[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) total[m] = first ? V::set(0.0f) : V::load(totals + m * kTile + j);
    for (int k = 0; k < n; k += kScaleBlock) {
      V acc[MR];
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m] = V::set(0.0f);
      // 9 lines by 4 blocks of columns: each fetches its first line again.
      fetch_lines<3>(fetch, group + k * 8);
      code_products<MR, W>(acc, nvfp4_word(tile, k, j), x, k);
      const V scale = e4m3_scales(nvfp4_scale(tile, k, j));
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) total[m] = fma(acc[m], scale, total[m]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) store(totals + m * kTile + j, total[m]);
  }
}

// One block of rows times K tile t, straight from the codes.
template <Weights W>
inline void block_codes(const RowBlock& block, const char* tile, int t, float* totals,
                        const Fetch& fetch) {
  const int n = std::min(kTile, block.k - t * kTile);
  if (n <= 0) return;
  const char* x[kMicroRows];
  for (int i = 0; i < block.rows; ++i) x[i] = block.x[i] + t * block.step;
  with_rows(block.rows,
            [&](auto count) { micro_codes<count, W>(tile, x, n, totals, t == 0, fetch); });
}

}  // namespace ei::EI_ISA
