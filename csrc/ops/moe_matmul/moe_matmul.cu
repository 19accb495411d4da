// Computes: moe_matmul (moe_matmul.h).
// Layout: experts in 64x64 tiles, row-major or codes (tiles.cuh); "entry" p is one (row, choice).
// Work split:
//   Up to 4 rows, and float32: nothing is sorted. One kernel for the up products, blocks along
//     (expert channels, entry); one for the down products, blocks along (hidden channels, row),
//     each going through its row's experts in ascending order, so the sum needs no further pass.
//   More rows of bfloat16: (1) entries sorted by expert, one block per expert, which counts for
//   itself
//     where its entries begin; (2) up products, (3) down products by tensor cores (mma_tile.cuh),
//     blocks along (weight rows, expert), looping over the expert's entries, so that its weights
//     are read from memory once; (4) per row the sum over its entries. Experts without entries
//     leave at once; the grid is the same whatever the routing.
//   Under batch_invariant every number of bfloat16 rows is sorted, and products leave K whole
//   (mma_tile.cuh). The price is that of matmul there, and with up to 4 rows two more launches.
// Order: the sum over a row's experts ascends by expert; products as in gemv.cuh and mma_tile.cuh.
// Shared memory: a row of x, then J rows of expert channels (few rows); 18 to 96 KiB of ring.
// Limits: D, F and their prefixes are multiples of 16; x, shared and out start their rows at
// multiples of
//   16 bytes; J * F values of x's type fit in shared memory when there are few rows.
// Speed: not yet measured on a GPU. Floor: the weights of the distinct experts that rows name.
// Source: the sorted form is common to public grouped products; no public code was used.
#include "../../core/gemv.cuh"
#include "../../core/launch.cuh"
#include "../../core/mma_tile.cuh"
#include "moe_matmul.h"

namespace ei::cuda {
namespace {

// Sizes, and the parts of the workspace.
struct Moe {
  int R, J, E, D, F;
  int32_t *entry, *order, *begin;
  char *middle, *result;
};

Moe make_moe(const MoeMatmulArgs& a) {
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
EI_DEVICE int id_of(const MoeMatmulArgs& a, int64_t r, int j) { return row<int32_t>(a.ids, r)[j]; }

// Whether choice i of a row comes before choice j: by expert, then by place.
EI_DEVICE bool before(const int32_t* ids, int i, int j) {
  return ids[i] < ids[j] || (ids[i] == ids[j] && i < j);
}

// Row `n` of expert e in an image of [E][row tiles][column tiles].
template <class W>
EI_DEVICE const char* expert_row(const Tensor& image, int e, int n) {
  const int64_t tile = e * image.shape[1] + n / kTile;
  return image.ptr<char>() + tile * image.shape[2] * kTileBytes<W> + row_offset<W>(n % kTile);
}

// ---- few rows

template <class X, class W>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    up_few(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  using G = Gemv<W>;
  EI_DYNAMIC_SHARED(X, x);
  const int p = blockIdx.y, r = p / m.J;
  const int columns = hidden_of(a, r), wanted = width_of(a, r);
  const int first = blockIdx.x * G::kBlockOutputs;
  const int e = id_of(a, r, p % m.J);
  if (first >= wanted || e < 0 || e >= m.E) return;
  const int pitch = G::pitch(columns);
  stage_row(x, row<X>(a.x, r), columns, pitch);
  __syncthreads();
  const int of_warp = first + first_output<W>();
  if (of_warp >= wanted) return;
  float sum[1];
  G::template dot<1>(expert_row<W>(a.up, e, of_warp), x, pitch, columns, sum);
  const int lane = threadIdx.x % kWarp, n = of_warp + lane / G::kLanes;
  if (writes_output<W>() && n < wanted)
    from_float(relu_squared<X>(scaled<W>(sum[0], a.up_scale, e)),
               reinterpret_cast<X*>(m.middle)[static_cast<int64_t>(p) * m.F + n]);
}

template <class X, class W>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    down_few(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  using G = Gemv<W>;
  EI_DYNAMIC_SHARED(X, middle);
  const int r = blockIdx.y;
  const int columns = width_of(a, r), wanted = hidden_of(a, r);
  const int pitch = G::pitch(columns);
  int* sorted = reinterpret_cast<int*>(middle + static_cast<int64_t>(m.J) * pitch);
  const int of_warp = blockIdx.x * G::kBlockOutputs + first_output<W>();
  const int32_t* ids = row<int32_t>(a.ids, r);
  for (int j = threadIdx.x; j < m.J; j += kGemvThreads) {
    int rank = 0;
    for (int i = 0; i < m.J; ++i) rank += before(ids, i, j);
    sorted[rank] = j;
  }
  for (int j = 0; j < m.J; ++j)
    stage_row(middle + j * pitch,
              reinterpret_cast<const X*>(m.middle) + (static_cast<int64_t>(r) * m.J + j) * m.F,
              columns, pitch);
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < m.J && of_warp < wanted; ++i) {
    const int j = sorted[i], e = ids[j];
    if (e < 0 || e >= m.E) continue;
    float sum[1];
    G::template dot<1>(expert_row<W>(a.down, e, of_warp), middle + j * pitch, pitch, columns, sum);
    total += rounded<X>(scaled<W>(sum[0], a.down_scale, e)) * row<float>(a.weights, r)[j];
  }
  const int lane = threadIdx.x % kWarp, n = of_warp + lane / G::kLanes;
  if (!writes_output<W>() || n >= m.D) return;
  if (a.shared && n < wanted) total += to_float(row<X>(a.shared, r)[n]);
  from_float(n < wanted ? total : 0.0f, row<X>(a.out, r)[n]);
}

// ---- many rows

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarp;

struct Counts {
  int of_warp[kSortWarps];
};

// The sum of `count` over the block's warps; it is the same in all lanes of a warp.
EI_DEVICE int sum_warps(int count, Counts& room) {
  __syncthreads();
  if (threadIdx.x % kWarp == 0) room.of_warp[threadIdx.x / kWarp] = count;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < kSortWarps; ++w) total += room.of_warp[w];
  return total;
}

// Block e writes where expert e begins and its entries, in ascending order.
__global__ void __launch_bounds__(kSortThreads)
    sort(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  EI_SHARED(Counts, counts);
  const int e = blockIdx.x, n = m.R * m.J, lane = threadIdx.x % kWarp;
  const auto id = [&](int p) { return p < n ? id_of(a, p / m.J, p % m.J) : INT32_MAX; };
  int less = 0;
  for (int first = 0; first < n; first += kSortThreads)
    less += count_bits(ballot(id(first + threadIdx.x) < e));
  int at = sum_warps(less, counts);
  if (threadIdx.x == 0) {
    m.begin[e] = at;
    if (e == m.E - 1) m.begin[m.E] = n;
  }
  for (int first = 0; first < n; first += kSortThreads) {
    const int p = first + threadIdx.x;
    const bool mine = id(p) == e;
    const uint32_t votes = ballot(mine);
    const int all = sum_warps(count_bits(votes), counts);
    if (mine) {
      int to = at + count_bits(votes & ((1u << lane) - 1));
      for (int w = 0; w < static_cast<int>(threadIdx.x) / kWarp; ++w) to += counts.of_warp[w];
      const int r = p / m.J, j = p % m.J;
      int rank = 0;
      for (int i = 0; i < m.J; ++i) rank += before(row<int32_t>(a.ids, r), i, j);
      m.entry[to] = p;
      m.order[r * m.J + rank] = to;
    }
    at += all;
  }
}

// One direction: the weight rows of block x of expert y times all entries of the expert.
template <class Shape, class W, bool kUp>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    grouped(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  EI_SHARED(Tokens<Shape::kN>, tokens);
  EI_DYNAMIC_SHARED(char, ring);
  const int e = blockIdx.y, first = blockIdx.x * Shape::kM;
  const int in = kUp ? m.D : m.F, out = kUp ? m.F : m.D;
  const Tensor& image = kUp ? a.up : a.down;
  const WeightRows weights{expert_row<W>(image, e, first), image.shape[2] * kTileBytes<W>,
                           static_cast<int>(image.shape[1]) * kTile - first};
  const int end = m.begin[e + 1];
  for (int at = m.begin[e]; at < end; at += Shape::kN) {
    const int count = min(Shape::kN, end - at);
    for (int i = threadIdx.x; i < Shape::kN; i += Shape::kThreads) {
      const bool there = i < count;
      const int r = there ? m.entry[at + i] / m.J : 0;
      tokens.x[i] = kUp ? row<bf16>(a.x, r)
                        : reinterpret_cast<const bf16*>(m.middle) +
                              static_cast<int64_t>(there ? at + i : 0) * in;
      tokens.columns[i] = !there ? 0 : kUp ? hidden_of(a, r) : width_of(a, r);
      tokens.wanted[i] = !there ? 0 : kUp ? width_of(a, r) : hidden_of(a, r);
    }
    __syncthreads();
    if (first < tokens.most_wanted()) {
      TileProduct<Shape, W> product(ring, weights, tokens);
      product.run(tokens.most_columns());
      bf16* to = reinterpret_cast<bf16*>(kUp ? m.middle : m.result);
      for (int i = threadIdx.x; i < count * Shape::kM; i += Shape::kThreads) {
        const int token = i / Shape::kM, n = i % Shape::kM;
        if (first + n >= tokens.wanted[token]) continue;
        const float sum = scaled<W>(product.sum(token, n), kUp ? a.up_scale : a.down_scale, e);
        from_float(kUp ? relu_squared<bf16>(sum) : sum,
                   to[static_cast<int64_t>(at + token) * out + first + n]);
      }
    }
    __syncthreads();  // before the tokens and the ring are used again
  }
}

constexpr int kCombineThreads = 128;

__global__ void __launch_bounds__(kCombineThreads)
    combine(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  constexpr int V = kVector<bf16>;
  const int64_t r = blockIdx.x;
  const int wanted = hidden_of(a, r);
  const float* weights = row<float>(a.weights, r);
  const bf16* result = reinterpret_cast<const bf16*>(m.result);
  for (int c = threadIdx.x * V; c < m.D; c += kCombineThreads * V) {
    float total[V] = {};
    for (int i = 0; i < m.J && c < wanted; ++i) {
      const int p = m.order[r * m.J + i];
      const float weight = weights[m.entry[p] - r * m.J];
      float v[V];
      load(result + static_cast<int64_t>(p) * m.D + c, v);
      EI_UNROLL
      for (int k = 0; k < V; ++k) total[k] += v[k] * weight;
    }
    if (a.shared && c < wanted) {
      float v[V];
      load(row<bf16>(a.shared, r) + c, v);
      EI_UNROLL
      for (int k = 0; k < V; ++k) total[k] += v[k];
    }
    store(row<bf16>(a.out, r) + c, total);
  }
}

// ---- launches

template <class X, class W>
void launch_few(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  const int64_t d_pitch = Gemv<W>::pitch(m.D), f_pitch = Gemv<W>::pitch(m.F);
  const dim3 up(static_cast<unsigned>(ceil_div(m.F, Gemv<W>::kBlockOutputs)), m.R * m.J);
  const dim3 down(static_cast<unsigned>(ceil_div(m.D, Gemv<W>::kBlockOutputs)), m.R);
  launch_early(call, up_few<X, W>, up, kGemvThreads, d_pitch * int64_t{sizeof(X)}, a, m);
  launch_early(call, down_few<X, W>, down, kGemvThreads,
               m.J * (f_pitch * int64_t{sizeof(X)} + int64_t{sizeof(int)}), a, m);
}

template <class Shape, class W>
void launch_shape(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  const dim3 up(static_cast<unsigned>(ceil_div(m.F, Shape::kM)), m.E);
  const dim3 down(static_cast<unsigned>(ceil_div(m.D, Shape::kM)), m.E);
  const int64_t shared = Shape::template kShared<W>;
  launch_early(call, grouped<Shape, W, true>, up, Shape::kThreads, shared, a, m);
  launch_early(call, grouped<Shape, W, false>, down, Shape::kThreads, shared, a, m);
}

template <class W>
void launch_many(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  launch_early(call, sort, dim3(m.E), kSortThreads, 0, a, m);
  const int64_t mean = ceil_div(static_cast<int64_t>(m.R) * m.J, m.E);  // entries of an expert
  with_shape(mean * 4 / 3, call.batch_invariant, [&](auto shape) {      // most fit one block so
    launch_shape<decltype(shape), W>(a, m, call);
  });
  launch_early(call, combine, dim3(m.R), kCombineThreads, 0, a, m);
}

template <class W>
void launch_weight(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  if (a.x.dtype == DType::f32) return launch_few<float, W>(a, m, call);
  if constexpr (!std::is_same_v<W, float>)
    m.R <= kGemvRows && !call.batch_invariant ? launch_few<bf16, W>(a, m, call)
                                              : launch_many<W>(a, m, call);
}

void launch_moe_matmul(const MoeMatmulArgs& a, const CudaCall& call) {
  require_aligned("moe_matmul", "x", a.x);
  require_aligned("moe_matmul", "shared", a.shared);
  require_aligned("moe_matmul", "out", a.out);
  const Moe m = make_moe(a);
  if (m.R * m.J == 0) return;
  switch (a.w_dtype) {
    case DType::f32: return launch_weight<float>(a, m, call);
    case DType::bf16: return launch_weight<bf16>(a, m, call);
    case DType::fp8: return launch_weight<Fp8>(a, m, call);
    default: return launch_weight<Nvfp4>(a, m, call);
  }
}

const RegisterCuda<MoeMatmulArgs, launch_moe_matmul> registered("moe_matmul");

}  // namespace
}  // namespace ei::cuda
