// Computes: matmul and matmul_pack (matmul.h).
// Layout: CUDA images hold row-major 64x64 tiles: a bfloat16 row is 128 bytes, a float row 256.
// Work split: up to 4 rows, and whenever something is float32: ordinary arithmetic (gemv.cuh), a
// warp 2
//   or 4 weight rows, blocks along all weight rows. More rows: tensor cores (mma_tile.cuh), blocks
//   of 16 to 128 weight rows x 8 to 128 rows of x; with few rows the four warps of a block split K.
//   A block runs to the widest k among its own rows of x; one whose weight rows nobody wants only
//   writes zeros.
// Shared memory: 4 rows of x (gemv); 18 to 96 KiB of ring (tensor cores).
// Limits: x starts its rows at multiples of 16 bytes; k sizes are multiples of 16.
// Speed: not yet measured on a GPU. Floor: the weight's prefix read once (up to about 180 rows),
//   then the products.
#include "../../core/gemv.cuh"
#include "../../core/image.h"
#include "../../core/launch.cuh"
#include "../../core/mma_tile.cuh"
#include "matmul.h"

namespace ei::cuda {
namespace {

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
int blocks_of(const MatmulArgs& a, int rows) {
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
EI_DEVICE const W* weight_row(const MatmulArgs& a, const Place& p) {
  const int64_t tile = a.tile_row[p.segment] + p.first / kTile;
  return a.w.ptr<W>() + tile * a.w.shape[1] * kTileValues + p.first % kTile * kTile;
}

template <int R, class X, class W, class O>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    few_rows(const __grid_constant__ MatmulArgs a) {
  using G = Gemv<W>;
  EI_DYNAMIC_SHARED(X, x);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * R;
  const int rows = static_cast<int>(min(static_cast<int64_t>(R), a.x.shape[0] - first_row));
  const Place p = locate<G::kBlockOutputs>(a, blockIdx.x);
  int columns = 0, widest = 0;
  for (int r = 0; r < rows; ++r) {
    columns = max(columns, columns_of(a, first_row + r));
    widest = max(widest, wanted_of(a, first_row + r, p.segment));
  }
  const int pitch = (columns + kTile - 1) / kTile * kTile;
  float sums[R] = {};
  const int lane = threadIdx.x % kWarp;
  const int row_of_warp = p.first + threadIdx.x / kWarp * G::kOutputs;
  if (p.first < widest) {
    for (int r = 0; r < R; ++r) {
      const int own = r < rows ? columns_of(a, first_row + r) : 0;
      stage_row(x + r * pitch, own ? row<X>(a.x, first_row + r) : x, own, pitch);
    }
    __syncthreads();
    if (row_of_warp < widest)
      G::template dot<R>(weight_row<W>(a, {p.segment, row_of_warp}), x, pitch, columns, sums);
  }
  const int n = row_of_warp + lane / G::kLanes;
  if (lane % G::kLanes != 0 || n >= a.rows[p.segment]) return;
  EI_UNROLL
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
    const bool wanted = n < wanted_of(a, first_row + r, p.segment);
    from_float(wanted ? activated<X>(a, sums[r]) : 0.0f,
               row<O>(a.out, first_row + r)[a.column[p.segment] + n]);
  }
}

template <class Shape, class O>
__global__ void __launch_bounds__(Shape::kThreads) many_rows(const __grid_constant__ MatmulArgs a) {
  EI_SHARED(Tokens<Shape::kN>, tokens);
  EI_DYNAMIC_SHARED(char, ring);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Shape::kN;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Shape::kN), a.x.shape[0] - first_row));
  const Place p = locate<Shape::kM>(a, blockIdx.x);
  for (int i = threadIdx.x; i < Shape::kN; i += Shape::kThreads) {
    const bool there = i < rows;
    tokens.x[i] = row<bf16>(a.x, there ? first_row + i : 0);
    tokens.columns[i] = there ? columns_of(a, first_row + i) : 0;
    tokens.wanted[i] = there ? wanted_of(a, first_row + i, p.segment) : 0;
  }
  __syncthreads();
  const bool needed = p.first < tokens.most_wanted();
  const int held = (a.rows[p.segment] + kTile - 1) / kTile * kTile - p.first;
  TileProduct<Shape> product(
      ring, WeightRows{weight_row<bf16>(a, p), a.w.shape[1] * kTileValues, held}, tokens);
  if (needed) product.run(tokens.most_columns());
  const int outputs = min(Shape::kM, a.rows[p.segment] - p.first);
  for (int i = threadIdx.x; i < rows * Shape::kM; i += Shape::kThreads) {
    const int token = i / Shape::kM, m = i % Shape::kM;
    if (m >= outputs) continue;
    const bool wanted = p.first + m < tokens.wanted[token];
    from_float(wanted ? activated<bf16>(a, product.sum(token, m)) : 0.0f,
               row<O>(a.out, first_row + token)[a.column[p.segment] + p.first + m]);
  }
}

template <class X, class W, class O>
void launch_few(const MatmulArgs& a, const CudaCall& call) {
  const int64_t R = a.x.shape[0], pitch = ceil_div(a.x.shape[1], kTile) * kTile;
  const int per_block = R == 1 ? 1 : R == 2 ? 2 : kGemvRows;
  auto* kernel = R == 1   ? few_rows<1, X, W, O>
                 : R == 2 ? few_rows<2, X, W, O>
                          : few_rows<kGemvRows, X, W, O>;
  const dim3 grid(blocks_of(a, Gemv<W>::kBlockOutputs),
                  static_cast<unsigned>(ceil_div(R, per_block)));
  launch(call, kernel, grid, kGemvThreads, per_block * pitch * int64_t{sizeof(X)}, a);
}

template <class Shape, class O>
void launch_shape(const MatmulArgs& a, const CudaCall& call) {
  const dim3 grid(blocks_of(a, Shape::kM),
                  static_cast<unsigned>(ceil_div(a.x.shape[0], Shape::kN)));
  launch(call, many_rows<Shape, O>, grid, Shape::kThreads, Shape::kShared, a);
}

template <class O>
void launch_output(const MatmulArgs& a, const CudaCall& call) {
  const int64_t R = a.x.shape[0];
  if (a.x.dtype == DType::f32 && a.w_dtype == DType::f32)
    return launch_few<float, float, O>(a, call);
  if (a.x.dtype == DType::f32) return launch_few<float, bf16, O>(a, call);
  if (R <= kGemvRows) return launch_few<bf16, bf16, O>(a, call);
  if (R <= 8) return launch_shape<Tokens8, O>(a, call);
  if (R <= 16) return launch_shape<Tokens16, O>(a, call);
  if (R <= 32) return launch_shape<Tokens32, O>(a, call);
  if (R <= 64) return launch_shape<Tokens64, O>(a, call);
  launch_shape<Tokens128, O>(a, call);
}

void launch_matmul(const MatmulArgs& a, const CudaCall& call) {
  require_float_image("matmul", "w", a.w_dtype);
  require_aligned("matmul", "x", a.x);
  a.out.dtype == DType::bf16 ? launch_output<bf16>(a, call) : launch_output<float>(a, call);
}

constexpr int kPackThreads = 256;

// One tile of the image: rows and columns that the source lacks become zero.
template <class S, class W>
__global__ void __launch_bounds__(kPackThreads) pack(const __grid_constant__ PackArgs a) {
  const int64_t tile_row = a.tile_row + blockIdx.x;
  W* tile = a.image.ptr<W>() + (tile_row * a.image.shape[1] + blockIdx.y) * kTileValues;
  for (int i = threadIdx.x; i < kTileValues; i += kPackThreads) {
    const int64_t r = blockIdx.x * int64_t{kTile} + i / kTile;
    const int64_t c = blockIdx.y * int64_t{kTile} + i % kTile;
    const bool there = r < a.source.shape[0] && c < a.source.shape[1];
    from_float(there ? to_float(row<S>(a.source, r)[c]) : 0.0f, tile[i]);
  }
}

void launch_pack(const PackArgs& a, const CudaCall& call) {
  require_float_image("matmul_pack", "image", a.w_dtype);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.source.shape[0], kTile)),
                  static_cast<unsigned>(a.image.shape[1]));
  const bool s16 = a.source.dtype == DType::bf16, w16 = a.w_dtype == DType::bf16;
  auto* kernel = s16 ? (w16 ? pack<bf16, bf16> : pack<bf16, float>)
                     : (w16 ? pack<float, bf16> : pack<float, float>);
  launch(call, kernel, grid, kPackThreads, 0, a);
}

const RegisterCuda<MatmulArgs, launch_matmul> registered("matmul");
const RegisterCuda<PackArgs, launch_pack> registered_pack("matmul_pack");

}  // namespace
}  // namespace ei::cuda
