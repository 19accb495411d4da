// Quantised tiles of weights: how they lie on the CPU, and their products with activations.
//
//   FP8 tile:   [16 groups of 4 columns][64 rows] words (4 KiB); the bytes of a word are the codes
//               of columns 0, 2, 1, 3, so that a vector of words gives pairs of columns.
//   NVFP4 tile: 4 blocks of 16 columns, each [2 groups of 8 columns][64 rows] words (512 B); the
//               low half of a word has the codes of the even columns, the high half those of the
//               odd ones, ascending from the lowest four bits; then 64 block scales (64 B). Any
//               number of rows of x reads it from the first to the last byte.
//
// Codes become bf16 or float exactly. What is left to multiply with, the tensor's scale and
// kBlockFactor, is applied to the finished sums.
#pragma once
#include "cpu/gemm_micro.h"

namespace ei::EI_ISA {

constexpr int kNvfp4Group = 8, kFp8Group = 4;                 // columns per word
constexpr int kBlockBytes = kTile * kScaleBlock / 2 + kTile;  // of a block of 16 columns

// The word of row r and columns c to c + 7 of an NVFP4 tile, and the scale of that row's block.
inline const uint32_t* nvfp4_word(const char* tile, int c, int r) {
  return reinterpret_cast<const uint32_t*>(tile + c / kScaleBlock * kBlockBytes) +
         c % kScaleBlock / kNvfp4Group * kTile + r;
}
inline const uint8_t* nvfp4_scale(const char* tile, int c, int r) {
  return reinterpret_cast<const uint8_t*>(tile) + c / kScaleBlock * kBlockBytes +
         kTile * kScaleBlock / 2 + r;
}

// Bits that column c (of a group) starts at in its word.
constexpr int nvfp4_shift(int c) { return c % 2 * 16 + c / 2 * 4; }
constexpr int fp8_shift(int c) { return c % 2 * 16 + c / 2 * 8; }

template <DType Tile>
inline void unpack(const uint32_t* words, V* out) {
  Tile == DType::nvfp4 ? e2m1_floats(words, out) : e4m3_floats(words, out);
}

// The block scales of the first n columns of an NVFP4 tile as floats.
inline void expand_scales(const char* tile, int n, float* scales) {
  for (int k = 0; k < n; k += kScaleBlock)
    for (int j = 0; j < kTile; j += V::kLanes)
      store(scales + k / kScaleBlock * kTile + j, e4m3_scales(nvfp4_scale(tile, k, j)));
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
  if (Tile == DType::nvfp4) expand_scales(tile, n, scales);
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

// Tiles to fetch while another is multiplied: `far` from memory into the second cache, `near` from
// there into the first. With so little arithmetic a byte the hardware's own guess comes late, and
// the first cache alone can wait for too few lines at once to hide the way to memory.
struct Fetch {
  const char *near, *far;
};
// Tiles before they are needed. Loops over bytes are so short that the hardware's guess is in time:
// they ask for a line just ahead of its load, and any farther ahead costs them a tenth.
template <Weights W>
constexpr int kNear = W == Weights::int8 ? 0 : 1;
template <Weights W>
constexpr int kFar = W == Weights::int8 ? 0 : 8;

// The tile that is read `distance` tiles after tile t of a row of tiles, of which `count` are read;
// tile t itself from `end` on.
inline const char* tile_ahead(const char* row, int64_t row_bytes, int t, int distance, int count,
                              int64_t bytes, const char* end) {
  const int at = t + distance;
  const char* ahead = row + at / count * row_bytes + at % count * bytes;
  return ahead < end ? ahead : row + t * bytes;
}

// A line of 64 bytes of both.
inline void fetch_line(const Fetch& fetch, int offset) {
  __builtin_prefetch(fetch.near + offset, 0, 3);
  __builtin_prefetch(fetch.far + offset, 0, 2);
}

// Vectors of rows that share what is read of x, so that it is spread over the lanes once.
template <int MR>
constexpr int kCodeVectors = V::kLanes != 16 ? 1
                             : MR == 1       ? 4
                             : MR == 2       ? 2
                                             : 1;

// Goes through the first n columns of an NVFP4 tile as it lies: f(k, r, offset) for NJ vectors of
// rows from r on and the 16 columns from k on. Each turn fetches its share of the tiles to come,
// from `offset` on and rounded up: one line beside each vector of words, since a burst of them
// would hold up the loads, and one more.
template <int NJ, class F>
inline void code_turns(int n, const F& f) {
  constexpr int rows = NJ * V::kLanes, turns = kTile / rows, lines = kBlockBytes / 64;
  for (int k = 0; k < n; k += kScaleBlock)
    for (int r = 0; r < kTile; r += rows)
      f(k, r, k / kScaleBlock * kBlockBytes + r / rows * lines / turns * 64);
}

// One turn: f(j, c, words) for both groups of 8 columns, from c on, of each vector j of rows; and
// the turn's lines of the tiles to come.
template <int NJ, class F>
inline void code_words(const char* tile, int k, int r, const Fetch& fetch, int offset, const F& f) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
    for (int j = 0; j < NJ; ++j) {
      const int c = k + half * kNvfp4Group;
      fetch_line(fetch, offset + (half * NJ + j) * 64);
      f(j, c, nvfp4_word(tile, c, r + j * V::kLanes));
    }
  fetch_line(fetch, offset + 2 * NJ * 64);
}

// acc[m][j] += the products of the 8 columns from c on, straight from their codes at `words`.
template <int MR, int NJ, Weights W>
inline void code_products(V (&acc)[MR][NJ], int j, const uint32_t* words, const char* const* x,
                          int c) {
  constexpr int steps = W == Weights::pairs ? kNvfp4Group / 2 : kNvfp4Group;
  std::conditional_t<W == Weights::pairs, Pairs, V> w[steps];
  if constexpr (W == Weights::pairs)
    e2m1_pairs(words, w);
  else
    e2m1_floats(words, w);
#pragma GCC unroll 8
  for (int s = 0; s < steps; ++s)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const char* values = x[m] + (W == Weights::pairs ? (c + 2 * s) * 2 : (c + s) * 4);
      if constexpr (W == Weights::pairs) {
        uint32_t pair;
        std::memcpy(&pair, values, 4);
        acc[m][j] = dot_pairs(acc[m][j], w[s], pair);
      } else {
        acc[m][j] = fma(w[s], V::set(*reinterpret_cast<const float*>(values)), acc[m][j]);
      }
    }
}

// totals[m][64 lanes] (+)= sum over n columns of an NVFP4 tile, in the order of micro_blocks().
template <int MR, Weights W>
inline void micro_codes(const char* tile, const char* const* x, int n, float* totals, bool first,
                        const Fetch& fetch) {
  constexpr int L = V::kLanes, NJ = kCodeVectors<MR>;
  code_turns<NJ>(n, [&](int k, int r, int offset) {
    V acc[MR][NJ];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NJ; ++j) acc[m][j] = V::set(0.0f);
    code_words<NJ>(tile, k, r, fetch, offset, [&](int j, int c, const uint32_t* words) {
      code_products<MR, NJ, W>(acc, j, words, x, c);
    });
    const bool from_zero = first && k == 0;
#pragma GCC unroll 4
    for (int j = 0; j < NJ; ++j) {
      const V scale = e4m3_scales(nvfp4_scale(tile, k, r + j * L));
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        float* t = totals + m * kTile + r + j * L;
        store(t, fma(acc[m][j], scale, from_zero ? V::set(0.0f) : V::load(t)));
      }
    }
  });
}

}  // namespace ei::EI_ISA
