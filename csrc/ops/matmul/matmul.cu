// Computes: matmul and matmul_pack (matmul.h).
// Layout: CUDA images hold row-major 64x64 tiles: a bfloat16 row is 128 bytes, a float row 256.
//   FP8 and NVFP4 tiles hold codes in the order of matrix fragments (tiles.cuh, with the number of
//   instructions that a code costs).
// Work split: up to 4 rows, and whenever something is float32: ordinary arithmetic (gemv.cuh), a
//   warp 2 or 4 weight rows, blocks along all weight rows. Quantised weights: the same kernel up to
//   8 rows, a block 16 weight rows, its warps splitting K, products on tensor cores (float32 x:
//   ordinary arithmetic). More rows: tensor cores (mma_tile.cuh), blocks of 16 to 128 weight rows x
//   8 to 128 rows of x; with few rows the four warps of a block split K. Codes become bfloat16 in
//   registers in every case; scales of tensors multiply the finished sums.
//   Under batch_invariant, bfloat16 x takes the tensor cores for any number of rows, in shapes that
//   leave K whole (mma_tile.cuh), and float32 x the kernel of 4 rows: one order of summation. The
//   price: one row loses the wide reads of gemv.cuh, up to 64 rows the warps that share K.
//   A block runs to the widest k among its own rows of x; one whose weight rows nobody wants only
//   writes zeros.
// Shared memory: up to 8 rows of x (few rows); 16 to 96 KiB of ring (tensor cores).
// Limits: x starts its rows at multiples of 16 bytes; k sizes are multiples of 16.
// Speed: not yet measured on a GPU. Floor: the weight's prefix read once (up to about 180 rows),
//   then the products.
#include "matmul.cuh"

namespace ei::cuda {
namespace {

template <int R, class X, class W, class O>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    few_rows(const __grid_constant__ MatmulArgs a, bool early) {
  using G = Gemv<W>;
  EI_DYNAMIC_SHARED(X, x);
  const int64_t first_row = row_of_grid() * R;  // beyond the rows: nothing is wanted
  const int rows = static_cast<int>(min(static_cast<int64_t>(R), a.x.shape[0] - first_row));
  const Place p = locate<G::kBlockOutputs>(a, blockIdx.x);
  int columns = 0, widest = 0;
  for (int r = 0; r < rows; ++r) {
    columns = max(columns, columns_of(a, first_row + r));
    widest = max(widest, wanted_of(a, first_row + r, p.segment));
  }
  const int pitch = G::pitch(columns);
  float sums[R] = {};
  const int lane = threadIdx.x % kWarp;
  const int row_of_warp = p.first + first_output<W>();
  if (early && p.first < widest) prefetch_weights<W>(weight_row<W>(a, p), columns);
  begin_kernel();
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
  if (!writes_output<W>() || n >= a.rows[p.segment]) return;
  EI_UNROLL
  for (int r = 0; r < R; ++r) {
    if (r >= rows) break;
    const bool wanted = n < wanted_of(a, first_row + r, p.segment);
    const float sum = scaled<W>(sums[r], a.scale, p.segment);
    from_float(wanted ? activated<X>(a, sum) : 0.0f,
               row<O>(a.out, first_row + r)[a.column[p.segment] + n]);
  }
}

template <class Shape, class W, class O>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    many_rows(const __grid_constant__ MatmulArgs a) {
  begin_kernel();
  EI_SHARED(Tokens<Shape::kN>, tokens);
  EI_DYNAMIC_SHARED(char, ring);
  const BlockWork<Shape> work(a, tokens);
  TileProduct<Shape, W> product(ring, work.template weights<W>(), tokens);
  if (work.needed()) product.run(tokens.most_columns());
  work.template write<bf16, O>([&](int token, int m) {
    return scaled<W>(product.sum(token, m), a.scale, work.place.segment);
  });
}

// Rows of x of one block of few_rows, for R rows in all, and their bytes of shared memory.
template <class X, class W>
int few_per_block(int64_t R, const CudaCall& call) {
  if (call.batch_invariant) return kGemvRows;
  if (R == 1) return 1;
  if (kQuantised<W> && R > kGemvRows && std::is_same_v<X, bf16>) return kCodeRows;
  return !kQuantised<W> && R == 2 ? 2 : kGemvRows;
}
template <class X, class W>
int64_t few_shared(const MatmulArgs& a, int64_t per_block) {
  return per_block * int64_t{sizeof(X)} * Gemv<W>::pitch(static_cast<int>(a.x.shape[1]));
}
constexpr int64_t kFewShared = kLeastShared - kFewStatic;

template <class X, class W, class O>
void launch_few(const MatmulArgs& a, const CudaCall& call) {
  const int64_t R = a.x.shape[0];
  int64_t per_block = few_per_block<X, W>(R, call);
  // Long rows one by one: the sums of a row are the same.
  if (few_shared<X, W>(a, per_block) > kFewShared) per_block = 1;
  require_shared("matmul", "x", a.x, few_shared<X, W>(a, per_block));
  auto* kernel = per_block == 1 ? few_rows<1, X, W, O> : few_rows<kGemvRows, X, W, O>;
  if constexpr (!kQuantised<W>) {
    if (per_block == 2) kernel = few_rows<2, X, W, O>;
  } else if constexpr (std::is_same_v<X, bf16>) {
    if (per_block == kCodeRows) kernel = few_rows<kCodeRows, X, W, O>;
  }
  const dim3 grid = grid_of_rows(blocks_of(a, Gemv<W>::kBlockOutputs), ceil_div(R, per_block));
  launch_early(call, kernel, grid, kGemvThreads, few_shared<X, W>(a, per_block), a,
               call.dependent_launch);
}

template <class Shape, class W, class O>
void launch_shape(const MatmulArgs& a, const CudaCall& call) {
  const dim3 grid(blocks_of(a, Shape::kM),
                  static_cast<unsigned>(ceil_div(a.x.shape[0], Shape::kN)));
  launch_early(call, many_rows<Shape, W, O>, grid, Shape::kThreads, Shape::template kShared<W>, a);
}

template <class W, class O>
void launch_output(const MatmulArgs& a, const CudaCall& call) {
  const int64_t R = a.x.shape[0];
  if (a.x.dtype == DType::f32) return launch_few<float, W, O>(a, call);
  if constexpr (!std::is_same_v<W, float>) {
    const bool few = R <= (kQuantised<W> ? kCodeRows : kGemvRows) &&
                     few_shared<bf16, W>(a, few_per_block<bf16, W>(R, call)) <= kFewShared;
    if (few && !call.batch_invariant) return launch_few<bf16, W, O>(a, call);
    with_shape(R, call.batch_invariant,
               [&](auto shape) { launch_shape<decltype(shape), W, O>(a, call); });
  }
}

template <class W>
void launch_weight(const MatmulArgs& a, const CudaCall& call) {
  a.out.dtype == DType::bf16 ? launch_output<W, bf16>(a, call) : launch_output<W, float>(a, call);
}

void launch_matmul(const MatmulArgs& a, const CudaCall& call) {
  require_aligned("matmul", "x", a.x);
  require_aligned("matmul", "w", a.w);
  switch (a.w_dtype) {
    case DType::f32: return launch_weight<float>(a, call);
    case DType::bf16: return launch_weight<bf16>(a, call);
    case DType::fp8: return launch_weight<Fp8>(a, call);
    default: return launch_weight<Nvfp4>(a, call);
  }
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

// Code (r, c) of the source, zero where it lacks one or its block scale is zero: E4M3, or E2M1 with
// its bits where e2m1_word() wants them.
template <class W>
EI_DEVICE uint32_t code_at(const PackArgs& a, int64_t r, int64_t c) {
  if (r >= a.source.shape[0]) return 0;
  const uint8_t* codes = row<uint8_t>(a.source, r);
  if constexpr (std::is_same_v<W, Fp8>) return c < a.source.shape[1] ? codes[c] : 0;
  if (c >= a.source.shape[1] * 2 || row<uint8_t>(a.block_scales, r)[c / kRun] == 0) return 0;
  return e2m1_half(codes[c / 2] >> c % 2 * 4 & 15);
}

// One tile of codes.
template <class W>
__global__ void __launch_bounds__(kPackThreads) pack_codes(const __grid_constant__ PackArgs a) {
  constexpr bool kFour = std::is_same_v<W, Nvfp4>;
  char* tile = a.image.ptr<char>() +
               ((a.tile_row + blockIdx.x) * a.image.shape[1] + blockIdx.y) * kTileBytes<W>;
  const int64_t first_row = blockIdx.x * int64_t{kTile}, first = blockIdx.y * int64_t{kTile};
  for (int i = threadIdx.x; i < kTileValues / 8; i += kPackThreads) {  // fragments of lanes
    const int run = i / 128, lane = i / 4 % 32, step = i % 4;
    char* to = tile + row_offset<W>(run * kRun);
    uint32_t pairs[4], next[4];  // low and high codes
    for (int j = 0; j < 4; ++j) {
      const int64_t r = first_row + run * kRun + pair_row(lane, j);
      const int64_t c = first + step * kRun + pair_column(lane, j);
      pairs[j] = code_at<W>(a, r, c), next[j] = code_at<W>(a, r, c + 1);
    }
    if constexpr (kFour) {
      for (int j = 0; j < 4; ++j) pairs[j] |= next[j] << 16;
      reinterpret_cast<uint32_t*>(to)[lane * 4 + step] = e2m1_word(pairs);
    } else {
      uint32_t* words = reinterpret_cast<uint32_t*>(to + step / 2 * 512 + lane * 16 + step % 2 * 8);
      for (int j = 0; j < 4; j += 2)
        words[j / 2] = e4m3_word(pairs[j], next[j], pairs[j + 1], next[j + 1]);
    }
  }
  if constexpr (kFour) {
    const int i = threadIdx.x, run = i / kTile, step = i % 4;  // a thread, a block scale
    const int64_t r = first_row + run * kRun + i % kTile / 8 + i / 4 % 2 * 8;
    const int64_t c = first / kRun + step;
    const bool there = r < a.source.shape[0] && c < a.block_scales.shape[1];
    tile[row_offset<W>(run * kRun) + W::kCodeBytes + i % kTile] =
        static_cast<char>(there ? scale_byte(row<uint8_t>(a.block_scales, r)[c]) : 0);
  }
}
static_assert(kPackThreads == kTile * 4, "a thread of pack_codes has one block scale");

void launch_pack(const PackArgs& a, const CudaCall& call) {
  require_aligned("matmul_pack", "image", a.image);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.source.shape[0], kTile)),
                  static_cast<unsigned>(a.image.shape[1]));
  if (a.w_dtype == DType::nvfp4) return launch(call, pack_codes<Nvfp4>, grid, kPackThreads, 0, a);
  if (a.w_dtype == DType::fp8) return launch(call, pack_codes<Fp8>, grid, kPackThreads, 0, a);
  const bool s16 = a.source.dtype == DType::bf16, w16 = a.w_dtype == DType::bf16;
  auto* kernel = s16 ? (w16 ? pack<bf16, bf16> : pack<bf16, float>)
                     : (w16 ? pack<float, bf16> : pack<float, float>);
  launch(call, kernel, grid, kPackThreads, 0, a);
}

const RegisterCuda<MatmulArgs, launch_matmul> registered("matmul");
const RegisterCuda<PackArgs, launch_pack> registered_pack("matmul_pack");

}  // namespace
}  // namespace ei::cuda
