// What the kernels of moe_matmul share: the workspace, where entries of experts are, and how a
// block goes through those of one.
#pragma once
#include "cuda/gemv.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma_tile.cuh"
#include "moe_matmul.h"

namespace ei::cuda {

// Sizes, and the parts of the workspace.
struct Moe {
  int R, J, E, D, F;
  int32_t *entry, *order, *begin;
  char *middle, *result;
};

inline Moe make_moe(const MoeMatmulArgs& a) {
  Moe m{};
  m.R = static_cast<int>(a.x.shape[0]);
  m.J = static_cast<int>(a.ids.shape[1]);
  m.E = static_cast<int>(a.up.shape[0]);
  m.D = static_cast<int>(a.x.shape[1]);
  m.F = static_cast<int>(a.F);
  const MoeWorkspace w = moe_workspace(m.R, m.J, m.E, m.D, m.F, dtype_size(a.x.dtype));
  char* base = a.workspace.ptr<char>();
  m.entry = reinterpret_cast<int32_t*>(base + w.entry);
  m.order = reinterpret_cast<int32_t*>(base + w.order);
  m.begin = reinterpret_cast<int32_t*>(base + w.begin);
  m.middle = base + w.middle;
  m.result = base + w.result;
  return m;
}

EI_DEVICE int hidden_of(const MoeMatmulArgs& a, int64_t r) {
  return active_size(a.row_width, a.k_sizes, r, a.x.shape[1]);
}
EI_DEVICE int width_of(const MoeMatmulArgs& a, int64_t r) {
  return active_size(a.row_width, a.f_sizes, r, a.F);
}
// Row `n` of expert e in an image of [E][row tiles][column tiles].
template <class W>
EI_DEVICE const char* expert_row(const Tensor& image, int e, int n) {
  const int64_t tile = e * image.shape[1] + n / kTile;
  return image.ptr<char>() + tile * image.shape[2] * kTileBytes<W> + row_offset<W>(n % kTile);
}

// What a block multiplies: Shape::kM weight rows of one expert, up or down, and all of the expert's
// entries, Shape::kN at a time. `X`: how a product finds an entry's row, at its address or by its
// number.
template <class Shape, bool kUp, class X = const bf16*>
struct ExpertWork {
  const MoeMatmulArgs& a;
  const Moe& m;
  Tokens<Shape::kN, X>& tokens;
  const int e = blockIdx.y, first = blockIdx.x * Shape::kM;

  template <class W>
  EI_DEVICE WeightRows weights() const {
    const Tensor& image = kUp ? a.up : a.down;
    return {expert_row<W>(image, e, first), image.shape[2] * kTileBytes<W>,
            static_cast<int>(image.shape[1]) * kTile - first};
  }
  EI_DEVICE const Tensor& scale() const { return kUp ? a.up_scale : a.down_scale; }

  // multiply(at, count) for each `count` entries from `at` on, some of which take a row of the
  // block, once they are the tokens; find(r, p) is what a product needs of entry p of row r.
  template <class Find, class Multiply>
  EI_DEVICE void each(const Find& find, const Multiply& multiply) const {
    const int end = m.begin[e + 1];
    for (int at = m.begin[e]; at < end; at += Shape::kN) {
      const int count = min(Shape::kN, end - at);
      for (int i = threadIdx.x; i < Shape::kN; i += Shape::kThreads) {
        const bool there = i < count;
        const int r = there ? m.entry[at + i] / m.J : 0;
        tokens.x[i] = find(r, there ? at + i : 0);
        tokens.columns[i] = !there ? 0 : kUp ? hidden_of(a, r) : width_of(a, r);
        tokens.wanted[i] = !there ? 0 : kUp ? width_of(a, r) : hidden_of(a, r);
      }
      __syncthreads();
      if (first < tokens.most_wanted()) multiply(at, count);
      __syncthreads();  // before the tokens and the ring are used again
    }
  }
  // Writes sum(token, n), rounded and activated as V, of those entries.
  template <class V, class Sum>
  EI_DEVICE void write(int at, int count, const Sum& sum) const {
    V* to = reinterpret_cast<V*>(kUp ? m.middle : m.result);
    const int out = kUp ? m.F : m.D;
    for (int i = threadIdx.x; i < count * Shape::kM; i += Shape::kThreads) {
      const int token = i / Shape::kM, n = i % Shape::kM;
      if (first + n >= tokens.wanted[token]) continue;
      const float v = sum(token, n);
      from_float(kUp ? relu_squared<V>(v) : v,
                 to[static_cast<int64_t>(at + token) * out + first + n]);
    }
  }
};

// Shape for the products of a call: most experts' entries fit one block.
template <class F>
void with_shape_of_experts(const Moe& m, const CudaCall& call, const F& f) {
  const int64_t mean = ceil_div(static_cast<int64_t>(m.R) * m.J, m.E);  // entries of an expert
  with_shape(mean * 4 / 3, call.batch_invariant, f);
}

// The grid of one direction.
template <class Shape>
dim3 expert_grid(const Moe& m, int outputs) {
  return dim3(static_cast<unsigned>(ceil_div(outputs, Shape::kM)), m.E);
}

// Launches (moe_matmul.cu) ahead of grouped products and behind them: entries sorted by expert; per
// row the sum over its entries.
void launch_sort(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call);
void launch_combine(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call);

// Refuses tensors that kernels read 16 bytes at a time and that are not aligned so.
inline void require_aligned_rows(const MoeMatmulArgs& a) {
  require_aligned("moe_matmul", "x", a.x);
  require_aligned("moe_matmul", "shared", a.shared);
  require_aligned("moe_matmul", "out", a.out);
  require_aligned("moe_matmul", "up", a.up);
  require_aligned("moe_matmul", "down", a.down);
}

}  // namespace ei::cuda
