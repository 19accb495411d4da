// What the kernels of matmul share: which weight rows a block has, and how much of them rows use.
#pragma once
#include "../../core/gemv.cuh"
#include "../../core/launch.cuh"
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

}  // namespace ei::cuda
