// What the kernels of matmul share: which weight rows a block has, and how much of them rows use.
#pragma once
#include "cuda/gemv.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma_tile.cuh"
#include "matmul.h"

namespace ei::cuda {

// The weight rows of a block of kRows: a segment, and the first of them inside it.
struct Place {
  int segment, first;
};
template <int kRows>
EI_DEVICE Place locate(const MatmulArgs& a, int block) {
  int s = 0;
  for (; block >= (a.rows[s] + kRows - 1) / kRows; ++s) block -= (a.rows[s] + kRows - 1) / kRows;
  return {s, block * kRows};
}
inline int blocks_of(const MatmulArgs& a, int rows) {
  int64_t blocks = 0;
  for (int s = 0; s < a.segments; ++s) blocks += ceil_div(a.rows[s], rows);
  return static_cast<int>(blocks);
}

EI_DEVICE int columns_of(const MatmulArgs& a, int64_t r) {
  return active_size(a.row_width, a.k_sizes, r, a.x.shape[1]);
}
// How many rows of segment s row r of x takes.
EI_DEVICE int wanted_of(const MatmulArgs& a, int64_t r, int s) {
  if (!a.row_width) return a.rows[s];
  return a.n_sizes.ptr<int32_t>()[a.row_width.ptr<int32_t>()[r] * a.segments + s];
}
// The value of one output: x's dtype X decides what the activation rounds to.
template <class X>
EI_DEVICE float activated(const MatmulArgs& a, float v) {
  return a.activation == Activation::relu2 ? relu_squared<X>(v) : v;
}
// Where row `first` of a segment is in its K tile 0.
template <class W>
EI_DEVICE const char* weight_row(const MatmulArgs& a, const Place& p) {
  const int64_t tile = a.tile_row[p.segment] + p.first / kTile;
  return a.w.ptr<char>() + tile * a.w.shape[1] * kTileBytes<W> + row_offset<W>(p.first % kTile);
}

// What a block of many rows multiplies: Shape::kM weight rows, and up to Shape::kN rows of x. `X`:
// how a product finds a row of x, at its address or by its number.
template <class Shape, class X = const bf16*>
struct BlockWork {
  const MatmulArgs& a;
  Tokens<Shape::kN, X>& tokens;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Shape::kN;  // of x
  const int rows = static_cast<int>(min(static_cast<int64_t>(Shape::kN), a.x.shape[0] - first_row));
  const Place place = locate<Shape::kM>(a, blockIdx.x);

  // Finds the tokens; all threads of the block come here.
  EI_DEVICE BlockWork(const MatmulArgs& a_, Tokens<Shape::kN, X>& tokens_)
      : a(a_), tokens(tokens_) {
    for (int i = threadIdx.x; i < Shape::kN; i += Shape::kThreads) {
      const bool there = i < rows;
      const int64_t r = there ? first_row + i : 0;
      if constexpr (std::is_pointer_v<X>)
        tokens.x[i] = row<bf16>(a.x, r);
      else
        tokens.x[i] = static_cast<X>(r);
      tokens.columns[i] = there ? columns_of(a, r) : 0;
      tokens.wanted[i] = there ? wanted_of(a, r, place.segment) : 0;
    }
    __syncthreads();
  }
  // Whether any token takes a row of the block.
  EI_DEVICE bool needed() const { return place.first < tokens.most_wanted(); }
  template <class W>
  EI_DEVICE WeightRows weights() const {
    const int held = (a.rows[place.segment] + kTile - 1) / kTile * kTile - place.first;
    return {weight_row<W>(a, place), a.w.shape[1] * kTileBytes<W>, held};
  }
  // Writes the outputs: sum(token, m), activated as V, x's dtype, rounds it, or zero where the
  // token wants no such row.
  template <class V, class O, class Sum>
  EI_DEVICE void write(const Sum& sum) const {
    const int outputs = min(Shape::kM, a.rows[place.segment] - place.first);
    for (int i = threadIdx.x; i < rows * Shape::kM; i += Shape::kThreads) {
      const int token = i / Shape::kM, m = i % Shape::kM;
      if (m >= outputs) continue;
      const bool wanted = place.first + m < tokens.wanted[token];
      from_float(wanted ? activated<V>(a, sum(token, m)) : 0.0f,
                 row<O>(a.out, first_row + token)[a.column[place.segment] + place.first + m]);
    }
  }
};

}  // namespace ei::cuda
