// Products of many rows with a tiled bfloat16 or quantised weight on tensor cores (mma.m16n8k16),
// weight rows as the 16 rows of the matrix instruction and rows of x ("tokens") as its 8 columns:
// with few tokens nothing is wasted on the weight's side, which is read once.
//
// A block multiplies kM weight rows with kN tokens. K tiles of 64 columns arrive in shared memory
// through a ring of stages (cp.async), 128 bytes per row, the 16-byte chunk c of row r at place
// c ^ (r % 8), so that ldmatrix reads eight rows from eight different banks. Quantised weights
// arrive as they are (tiles.cuh) and become fragments in registers: each once per 64 tokens of a
// warp at most, so that it costs little beside the products. Warps split the block along weight
// rows, tokens, and (with few tokens) the four 16-column steps of each K tile:
//
//            tokens: kWarpsN parts
//          +---------+---------+
//   weight |  warp   |  warp   |   each warp: 16 kM16 rows x 8 kN8 tokens
//   rows   +---------+---------+   and kWarpsK such layers, whose sums are added in order at the
//   end
#pragma once
#include "cuda/rows.cuh"
#include "cuda/tiles.cuh"

namespace ei::cuda {

template <int kM16_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kN_, int kStages_>
struct TileShape {
  static constexpr int kM16 = kM16_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kN = kN_, kStages = kStages_;
  static constexpr int kM = 16 * kM16 * kWarpsM;
  static constexpr int kN8 = kN / kWarpsN / 8;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kPitch = kM + 4;  // floats of one token's sums
  static constexpr int kSumBytes = kWarpsK * kN * kPitch * 4;
  template <class W>
  static constexpr int kWeightBytes = kTileBytes<W> / kTile * kM;  // of a stage
  template <class W>
  static constexpr int kStageBytes = kWeightBytes<W> + kN * 128;
  template <class W>
  static constexpr int kShared =
      kStages * kStageBytes<W> > kSumBytes ? kStages * kStageBytes<W> : kSumBytes;
  static_assert(kN8 == 1 || kN8 % 2 == 0, "ldmatrix brings two groups of 8 tokens");
  static_assert(4 % kWarpsK == 0, "warps share the four steps of a K tile");
};

// The tokens of a block. x[i], a row of values or its number, is read up to columns[i] (a multiple
// of 16) and is zero beyond; a token that does not exist has no columns. wanted[i]: how many weight
// rows it takes.
template <int N, class X = const bf16*>
struct Tokens {
  X x[N];
  int columns[N], wanted[N];

  // The largest of each, after a barrier.
  EI_DEVICE int most_columns() const { return most(columns); }
  EI_DEVICE int most_wanted() const { return most(wanted); }

 private:
  static EI_DEVICE int most(const int (&v)[N]) {
    int top = 0;
    for (int i = 0; i < N; ++i) top = max(top, v[i]);
    return top;
  }
};

// The weight rows of a block: row m of K tile t is at first + (m / 64) * tile_row + t * bytes of a
// tile + row_offset(m % 64).
struct WeightRows {
  const char* first;  // row 0 of the block, in K tile 0
  int64_t tile_row;   // bytes from one row of tiles to the next
  int rows;           // rows that the image holds from there on, a multiple of 16
};

// A thread's part of a block: its lane, and its warp's place along weight rows, tokens and K. The
// sums of a product pass through shared memory, a layer of it for every place along K.
template <class Shape>
class BlockPart {
 public:
  const int lane = threadIdx.x % kWarp, m = warp() % Shape::kWarpsM;
  const int n = warp() / Shape::kWarpsM % Shape::kWarpsN;
  const int k = warp() / Shape::kWarpsM / Shape::kWarpsN;

  EI_DEVICE void write(char* shared, const float (&sums)[Shape::kM16][Shape::kN8][4]) const {
    float* layer = reinterpret_cast<float*>(shared) + k * Shape::kN * Shape::kPitch;
    EI_UNROLL
    for (int i = 0; i < Shape::kM16; ++i) EI_UNROLL
    for (int j = 0; j < Shape::kN8; ++j) EI_UNROLL
    for (int v = 0; v < 4; ++v) {
      const int row = (m * Shape::kM16 + i) * 16 + lane / 4 + v / 2 * 8;
      const int token = (n * Shape::kN8 + j) * 8 + lane % 4 * 2 + v % 2;
      layer[token * Shape::kPitch + row] = sums[i][j][v];
    }
  }
  // Of all layers, in order.
  static EI_DEVICE float read(const char* shared, int token, int row) {
    const float* at = reinterpret_cast<const float*>(shared) + token * Shape::kPitch + row;
    float total = at[0];
    for (int i = 1; i < Shape::kWarpsK; ++i) total += at[i * Shape::kN * Shape::kPitch];
    return total;
  }

 private:
  static EI_DEVICE int warp() { return threadIdx.x / kWarp; }
};

// Goes through `count` stages of a ring of kStages: stage(t) asks for the copies of one,
// multiply(t) uses them. Ends with a barrier, behind which the ring's room is free.
template <int kStages, class Stage, class Multiply>
EI_DEVICE void through_ring(int count, const Stage& stage, const Multiply& multiply) {
  for (int t = 0; t < kStages - 1; ++t) {
    if (t < count) stage(t);
    commit_copies();
  }
  for (int t = 0; t < count; ++t) {
    wait_copies<kStages - 2>();
    __syncthreads();  // stage t is there for all, and all have left stage t - 1
    if (t + kStages - 1 < count) stage(t + kStages - 1);
    commit_copies();
    multiply(t);
  }
  wait_copies<0>();
  __syncthreads();
}

template <class Shape, class W>
class TileProduct {
 public:
  EI_DEVICE TileProduct(char* shared, const WeightRows& w, const Tokens<Shape::kN>& tokens)
      : shared_(shared), w_(w), tokens_(tokens) {}

  // sum(token, m) for all of the block, over the first `columns` columns. Ends with a barrier.
  EI_DEVICE void run(int columns) {
    through_ring<Shape::kStages>((columns + kTile - 1) / kTile, [&](int t) { stage(t); },
                                 [&](int t) { multiply(t, columns); });
    part_.write(shared_, sums_);  // the ring becomes the room for sums
    __syncthreads();
  }

  EI_DEVICE float sum(int token, int m) const { return BlockPart<Shape>::read(shared_, token, m); }

 private:
  static EI_DEVICE int place(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }
  EI_DEVICE char* buffer(int t) const {
    return shared_ + t % Shape::kStages * Shape::template kStageBytes<W>;
  }

  EI_DEVICE void stage(int t) const {
    char* weights = buffer(t);
    char* x = weights + Shape::template kWeightBytes<W>;
    // Pieces that lie in one go: a row, or a run of 16.
    constexpr int kRows = kQuantised<W> ? kRun : 1, kChunks = kTileBytes<W> / kTile * kRows / 16;
    for (int i = threadIdx.x; i < Shape::kM / kRows * kChunks; i += Shape::kThreads) {
      const int m = i / kChunks * kRows, chunk = i % kChunks;
      const char* from = w_.first + m / kTile * w_.tile_row + t * int64_t{kTileBytes<W>} +
                         row_offset<W>(m % kTile) + chunk * 16;
      copy_async<16>(weights + (kQuantised<W> ? i * 16 : place(m, chunk)), from, m < w_.rows);
    }
    for (int i = threadIdx.x; i < Shape::kN * 8; i += Shape::kThreads) {
      const int token = i / 8, chunk = i % 8, column = t * 64 + chunk * 8;
      const bool there = column < tokens_.columns[token];
      copy_async<16>(x + place(token, chunk), tokens_.x[token] + (there ? column : 0), there);
    }
  }

  EI_DEVICE void multiply(int t, int columns) {
    const char* weights = buffer(t);
    const char* x = weights + Shape::template kWeightBytes<W>;
    const int steps = min(4, (columns - t * 64) / 16);  // nothing beyond is touched: it may be NaN
    EI_UNROLL
    for (int i = 0; i < 4 / Shape::kWarpsK; ++i) {
      const int step = i * Shape::kWarpsK + part_.k;
      if (step >= steps) break;
      uint32_t a[Shape::kM16][4], b[Shape::kN8][2];
      EI_UNROLL
      for (int m = 0; m < Shape::kM16; ++m) {
        const int row = (part_.m * Shape::kM16 + m) * 16;
        if constexpr (kQuantised<W>)
          load_fragment<W>(weights + row_offset<W>(row), part_.lane, step, a[m]);
        else
          load_matrices(a[m], weights + place(row + part_.lane % 16, step * 2 + part_.lane / 16));
      }
      EI_UNROLL
      for (int n = 0; n < Shape::kN8; n += 2) {
        const int second = Shape::kN8 == 1 ? 0 : part_.lane / 16 * 8;
        const int token = (part_.n * Shape::kN8 + n) * 8 + second + part_.lane % 8;
        uint32_t two[4];
        load_matrices(two, x + place(token, step * 2 + part_.lane / 8 % 2));
        b[n][0] = two[0], b[n][1] = two[1];
        if constexpr (Shape::kN8 > 1) b[n + 1][0] = two[2], b[n + 1][1] = two[3];
      }
      EI_UNROLL
      for (int m = 0; m < Shape::kM16; ++m) EI_UNROLL
      for (int n = 0; n < Shape::kN8; ++n) multiply_add(sums_[m][n], a[m], b[n][0], b[n][1]);
    }
  }

  char* shared_;
  const WeightRows w_;
  const Tokens<Shape::kN>& tokens_;
  const BlockPart<Shape> part_;
  float sums_[Shape::kM16][Shape::kN8][4] = {};
};

// The block shapes: rows of the weight x tokens, ways to split, stages of the ring.
using Tokens8 = TileShape<1, 1, 1, 4, 8, 6>;      // 16 x 8: as many blocks as a narrow layer allows
using Tokens16 = TileShape<1, 1, 1, 4, 16, 6>;    // 16 x 16
using Tokens32 = TileShape<1, 2, 1, 2, 32, 4>;    // 32 x 32
using Tokens64 = TileShape<1, 2, 1, 2, 64, 4>;    // 32 x 64
using Tokens128 = TileShape<4, 2, 2, 1, 128, 3>;  // 128 x 128, warps 64 x 64: bound by the products

// Where bits must not depend on how many tokens there are, no warp has a part of K. Every sum is
// one accumulator that takes the steps in ascending order, in whichever of these shapes, so the
// shape may still follow the number of tokens. Few tokens pay for it: a block's weight rows go
// through one warp, which waits for each product, where four warps share the steps otherwise.
using Whole16 = TileShape<1, 1, 1, 1, 16, 8>;  // 16 x 16
using Whole64 = TileShape<1, 4, 1, 1, 64, 4>;  // 64 x 64
using Whole128 = Tokens128;

template <class Shape, class F>
void with_whole(const F& f) {
  static_assert(Shape::kWarpsK == 1, "one order of summation");
  f(Shape());
}

// f(shape) with the shape for `tokens` tokens.
template <class F>
void with_shape(int64_t tokens, bool batch_invariant, const F& f) {
  if (batch_invariant) {
    if (tokens <= 16) return with_whole<Whole16>(f);
    if (tokens <= 64) return with_whole<Whole64>(f);
    return with_whole<Whole128>(f);
  }
  if (tokens <= 8) return f(Tokens8());
  if (tokens <= 16) return f(Tokens16());
  if (tokens <= 32) return f(Tokens32());
  if (tokens <= 64) return f(Tokens64());
  f(Tokens128());
}

}  // namespace ei::cuda
