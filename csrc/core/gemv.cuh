// Products of a few rows with a tiled weight by ordinary arithmetic: for up to 4 rows, where
// reading the weight is all the time, and for float32, which tensor cores do not multiply.
//
// A tile is 64 weight rows of 64 columns, row-major and contiguous. A lane reads 16 bytes of one
// row, a run of lanes the whole row of a tile, a warp 2 (float) or 4 (bfloat16) rows: 512 bytes in
// one piece. Tile after tile along K, several reads are under way at once.
#pragma once
#include "rows.cuh"

namespace ei::cuda {

constexpr int kTile = 64;
constexpr int kGemvRows = 4;  // most rows of x
constexpr int kGemvThreads = 128;
constexpr int kGemvBlocks = 4;  // per multiprocessor: what the compiler may spend registers for

template <class W>
struct Gemv {
  static constexpr int V = kVector<W>;             // weights of one read
  static constexpr int kLanes = kTile / V;         // lanes of one weight row
  static constexpr int kOutputs = kWarp / kLanes;  // weight rows of a warp
  static constexpr int kBlockOutputs = kOutputs * (kGemvThreads / kWarp);

  // sums[r] = sum over k < columns of w[k] x[r][k], the same in all lanes of the row. `w` is this
  // warp's place in its first tile (its first weight row), `x` [R][pitch] shared memory, zero
  // beyond a row's own columns. Nothing of the weight beyond `columns` (a multiple of 16) is read.
  template <int R, class X>
  static EI_DEVICE void dot(const W* w, const X* x, int pitch, int columns, float (&sums)[R]) {
    const int lane = threadIdx.x % kWarp;
    const int within = lane % kLanes * V;  // column in the tile
    const W* mine = w + lane / kLanes * kTile + within;
    EI_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = 0.0f;
    EI_UNROLL_BY(4)
    for (int k = 0; k < columns; k += kTile) {
      if (k + within >= columns) continue;
      float weight[V];
      unpack(load_once(mine + static_cast<int64_t>(k) * kTile), weight);
      EI_UNROLL
      for (int r = 0; r < R; ++r) {
        float value[V];
        load_floats(x + r * pitch + k + within, value);
        EI_UNROLL
        for (int i = 0; i < V; ++i) sums[r] += weight[i] * value[i];
      }
    }
    EI_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = sum_lanes<kLanes>(sums[r]);
  }
};

// Row `to` of shared memory := x[0, own), then zero up to `columns`; all threads of the block.
template <class X>
EI_DEVICE void stage_row(X* to, const X* x, int own, int columns) {
  copy_row(to, x, own, threadIdx.x, kGemvThreads);
  clear_row(to, own, columns, threadIdx.x, kGemvThreads);
}

// relu(v)^2, v and the result as values of X. A NaN stays one.
template <class X>
EI_DEVICE float relu_squared(float v) {
  v = rounded<X>(v);
  return v < 0.0f ? 0.0f : v * v;
}

}  // namespace ei::cuda
