// What the kernels of matmul share: which weight rows a block has, and how much of them rows use.
#pragma once
#include "../../core/gemv.cuh"
#include "../../core/launch.cuh"
#include "../../core/mma_tile.cuh"
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

// The rows of x that a block of many has: `rows` of them from first_row on. A barrier follows.
template <int N>
EI_DEVICE void find_tokens(const MatmulArgs& a, const Place& p, int64_t first_row, int rows,
                           Tokens<N>& tokens) {
  for (int i = threadIdx.x; i < N; i += blockDim.x) {
    const bool there = i < rows;
    tokens.x[i] = row<bf16>(a.x, there ? first_row + i : 0);
    tokens.columns[i] = there ? columns_of(a, first_row + i) : 0;
    tokens.wanted[i] = there ? wanted_of(a, first_row + i, p.segment) : 0;
  }
  __syncthreads();
}

// Writes the outputs of a block of kM weight rows and `rows` tokens: sum(token, m), activated as X
// rounds it, or zero where the token wants no such row.
template <class X, class O, int kM, int N, class Sum>
EI_DEVICE void write_outputs(const MatmulArgs& a, const Place& p, int64_t first_row, int rows,
                             const Tokens<N>& tokens, const Sum& sum) {
  const int outputs = min(kM, a.rows[p.segment] - p.first);
  for (int i = threadIdx.x; i < rows * kM; i += blockDim.x) {
    const int token = i / kM, m = i % kM;
    if (m >= outputs) continue;
    const bool wanted = p.first + m < tokens.wanted[token];
    from_float(wanted ? activated<X>(a, sum(token, m)) : 0.0f,
               row<O>(a.out, first_row + token)[a.column[p.segment] + p.first + m]);
  }
}

}  // namespace ei::cuda
