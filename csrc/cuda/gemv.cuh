// Products of a few rows with a tiled weight, where reading the weight is all the time, and for
// float32, which tensor cores do not multiply.
//
// Float and bfloat16 weights: ordinary arithmetic. A tile is 64 weight rows of 64 columns,
// row-major and contiguous. A lane reads 16 bytes of one row, a run of lanes the whole row of a
// tile, a warp 2 (float) or 4 (bfloat16) rows: 512 bytes in one piece. Tile after tile along K,
// several reads are under way at once.
//
// Quantised weights (tiles.cuh): a block has one run of 16 rows, its warps take the K tiles in turn
// and add their sums in order at the end. Codes go from memory to registers and become fragments
// there; with bfloat16 activations the products are the tensor cores' even for one row, because
// with 8 codes in 4 bytes the instructions, not the reads, would be what takes the time.
#pragma once
#include "cuda/prim_grid.cuh"
#include "cuda/rows.cuh"
#include "cuda/tiles.cuh"

namespace ei::cuda {

constexpr int kGemvRows = 4;  // most rows of x
constexpr int kCodeRows = 8;  // most rows of bfloat16 x with a quantised weight
constexpr int kGemvThreads = 128;
constexpr int kGemvBlocks = 4;  // per multiprocessor: what the compiler may spend registers for

// Outputs of a warp are weight rows n = lane / kLanes; kSplit warps share them.
template <class W>
struct Gemv {
  static constexpr int V = kVector<W>;             // weights of one read
  static constexpr int kLanes = kTile / V;         // lanes of one weight row
  static constexpr int kOutputs = kWarp / kLanes;  // weight rows of a warp
  static constexpr int kSplit = 1;
  static constexpr int kBlockOutputs = kOutputs * (kGemvThreads / kWarp);

  // Values from one row of x in shared memory to the next.
  static EI_HOST_DEVICE int pitch(int columns) { return (columns + kTile - 1) / kTile * kTile; }

  // sums[r] = sum over k < columns of w[k] x[r][k], the same in all lanes of the row. `w` is this
  // warp's place in its first tile (its first weight row), `x` [R][pitch] shared memory, zero
  // beyond a row's own columns. Nothing of the weight beyond `columns` (a multiple of 16) is read.
  template <int R, class X>
  static EI_DEVICE void dot(const void* w, const X* x, int pitch, int columns, float (&sums)[R]) {
    const int lane = threadIdx.x % kWarp;
    const int within = lane % kLanes * V;  // column in the tile
    const W* mine = static_cast<const W*>(w) + lane / kLanes * kTile + within;
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
        for (int i = 0; i < V; ++i) sums[r] = fused(weight[i], value[i], sums[r]);
      }
    }
    EI_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = sum_lanes<kLanes>(sums[r]);
  }
};

// A warp's sums of 16 weight rows times up to R rows of x, over steps of 16 columns.
template <int R, class X>
struct StepSums;

template <int R>
struct StepSums<R, bf16> {
  static_assert(R <= 8, "the columns of a matrix instruction");
  float d[4] = {};

  // Adds steps [0, steps) of a part, the columns of x from `x` on.
  template <class Part>
  EI_DEVICE void add(const Part& part, const bf16* x, int pitch, int steps) {
    const int lane = threadIdx.x % kWarp;
    // The instruction's columns beyond R repeat row R - 1; nobody reads them.
    const bf16* mine = x + min(lane % 8, R - 1) * pitch + lane / 8 * 8;
    EI_UNROLL
    for (int s = 0; s < 4; s += 2) {
      if (s >= steps) break;
      uint32_t a[4], b[4];
      load_matrices(b, mine + s * kRun);
      fragment_of(part, s, a);
      multiply_add(d, a, b[0], b[1]);
      if (s + 1 >= steps) break;
      fragment_of(part, s + 1, a);
      multiply_add(d, a, b[2], b[3]);
    }
  }
  EI_DEVICE void write(float (&to)[R][kRun]) const {
    const int lane = threadIdx.x % kWarp;
    EI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int r = lane % 4 * 2 + j % 2;
      if (r < R) to[r][lane / 4 + j / 2 * 8] = d[j];
    }
  }
};

template <int R>
struct StepSums<R, float> {
  float d[R][2] = {};  // of weight rows g and g + 8

  template <class Part>
  EI_DEVICE void add(const Part& part, const float* x, int pitch, int steps) {
    const int lane = threadIdx.x % kWarp;
    EI_UNROLL
    for (int s = 0; s < 4; ++s) {
      if (s >= steps) break;
      uint32_t a[4];
      fragment_of(part, s, a);
      EI_UNROLL
      for (int r = 0; r < R; ++r) EI_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Bytes8 two = load8(x + r * pitch + s * kRun + pair_column(lane, j));
        float& sum = d[r][j % 2];
        sum = fused(float_from_bits(a[j] << 16), float_from_bits(two.word[0]), sum);
        sum = fused(float_from_bits(a[j] & 0xffff0000u), float_from_bits(two.word[1]), sum);
      }
    }
  }
  EI_DEVICE void write(float (&to)[R][kRun]) const {
    const int lane = threadIdx.x % kWarp;
    EI_UNROLL
    for (int r = 0; r < R; ++r) EI_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float total = sum_lanes<4>(d[r][half]);
      if (lane % 4 == 0) to[r][lane / 4 + half * 8] = total;
    }
  }
};

template <class W>
struct CodeGemv {
  static constexpr int kLanes = 2, kOutputs = kRun, kBlockOutputs = kRun;
  static constexpr int kSplit = kGemvThreads / kWarp;
  static constexpr int kAhead = 4;  // tiles whose codes are under way to a warp

  // Rows of x start in different banks for ldmatrix.
  static EI_HOST_DEVICE int pitch(int columns) { return (columns + kTile - 1) / kTile * kTile + 8; }

  template <int R>
  struct Room {
    float of[kSplit][R][kRun];
  };

  // As Gemv::dot, times 1 / W::kFactor; `w` is the block's run in K tile 0. All threads of the
  // block come here. Nothing of steps beyond `columns` is used.
  template <int R, class X>
  static EI_DEVICE void dot(const void* w, const X* x, int pitch, int columns, float (&sums)[R]) {
    EI_SHARED(Room<R>, room);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int tiles = (columns + kTile - 1) / kTile;
    const char* run = static_cast<const char*>(w);
    const auto fetch = [&](int t, typename W::Part& part) {
      if (t < tiles) load_part(run + static_cast<int64_t>(t) * kTileBytes<W>, lane, part);
    };
    StepSums<R, X> products;
    typename W::Part parts[kAhead] = {};
    EI_UNROLL
    for (int i = 0; i < kAhead; ++i) fetch(warp + i * kSplit, parts[i]);
    EI_UNROLL_BY(1)
    for (int first = warp; first < tiles; first += kAhead * kSplit) {
      EI_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int t = first + i * kSplit;
        if (t < tiles)
          products.add(parts[i], x + t * kTile, pitch, min(4, (columns - t * kTile) / kRun));
        fetch(t + kAhead * kSplit, parts[i]);
      }
    }
    __syncthreads();  // all have read what the last call left in the room
    products.write(room.of[warp]);
    __syncthreads();
    EI_UNROLL
    for (int r = 0; r < R; ++r) {
      sums[r] = 0.0f;
      for (int i = 0; i < kSplit; ++i) sums[r] += room.of[i][r][lane / kLanes];
    }
  }
};
template <>
struct Gemv<Nvfp4> : CodeGemv<Nvfp4> {};
template <>
struct Gemv<Fp8> : CodeGemv<Fp8> {};

// The first weight row of this thread's warp within its block's, and whether the thread is the one
// that writes the output of its weight row.
template <class W>
EI_DEVICE int first_output() {
  return static_cast<int>(threadIdx.x) / kWarp / Gemv<W>::kSplit * Gemv<W>::kOutputs;
}
template <class W>
EI_DEVICE bool writes_output() {
  return threadIdx.x % Gemv<W>::kLanes == 0 && threadIdx.x / kWarp % Gemv<W>::kSplit == 0;
}

// Asks for the beginning of a block's weight rows in the second-level cache, one line per thread:
// for a kernel that still waits for its activations. `w`: its first row in K tile 0. 16 KiB: what
// its reads have under way when they begin, and little enough not to hold up the launch before.
template <class W>
EI_DEVICE void prefetch_weights(const void* w, int columns) {
  constexpr int kLine = 128, kBytes = kTileBytes<W> * Gemv<W>::kBlockOutputs / kTile;
  constexpr int kLines = (kBytes + kLine - 1) / kLine;  // of one tile
  const int t = static_cast<int>(threadIdx.x) / kLines, line = threadIdx.x % kLines;
  if (t * kTile < columns)
    prefetch_l2(static_cast<const char*>(w) + int64_t{kTileBytes<W>} * t + line * kLine);
}

// What sums of W are multiplied with: nothing, or the scale `index` of a quantised weight.
template <class W>
EI_DEVICE float scaled(float sum, const Tensor& scale, int64_t index) {
  if constexpr (kQuantised<W>)
    return sum * (scale.ptr<float>()[index] * W::kFactor);
  else
    return sum;
}

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
