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
#include "moe_matmul.cuh"

namespace ei::cuda {
namespace {

EI_DEVICE int id_of(const MoeMatmulArgs& a, int64_t r, int j) { return row<int32_t>(a.ids, r)[j]; }

// Whether choice i of a row comes before choice j: by expert, then by place.
EI_DEVICE bool before(const int32_t* ids, int i, int j) {
  return ids[i] < ids[j] || (ids[i] == ids[j] && i < j);
}

// ---- few rows

template <class X, class W>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    up_few(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  using G = Gemv<W>;
  EI_DYNAMIC_SHARED(X, x);
  const int p = static_cast<int>(row_of_grid()), r = p / m.J;
  if (r >= m.R) return;
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
  const int r = static_cast<int>(row_of_grid());
  if (r >= m.R) return;
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
    total =
        fused(rounded<X>(scaled<W>(sum[0], a.down_scale, e)), row<float>(a.weights, r)[j], total);
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
  const ExpertWork<Shape, kUp> work{a, m, tokens};
  const WeightRows weights = work.template weights<W>();
  const auto find = [&](int r, int p) {
    return kUp ? row<bf16>(a.x, r)
               : reinterpret_cast<const bf16*>(m.middle) + static_cast<int64_t>(p) * m.F;
  };
  work.each(find, [&](int at, int count) {
    TileProduct<Shape, W> product(ring, weights, tokens);
    product.run(tokens.most_columns());
    work.template write<bf16>(at, count, [&](int token, int n) {
      return scaled<W>(product.sum(token, n), work.scale(), work.e);
    });
  });
}

constexpr int kCombineThreads = 128;

template <class X>
__global__ void __launch_bounds__(kCombineThreads)
    combine(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m) {
  begin_kernel();
  constexpr int V = kVector<X>;
  const int64_t r = blockIdx.x;
  const int wanted = hidden_of(a, r);
  const float* weights = row<float>(a.weights, r);
  const X* result = reinterpret_cast<const X*>(m.result);
  for (int c = threadIdx.x * V; c < m.D; c += kCombineThreads * V) {
    float total[V] = {};
    for (int i = 0; i < m.J && c < wanted; ++i) {
      const int p = m.order[r * m.J + i];
      const float weight = weights[m.entry[p] - r * m.J];
      float v[V];
      load(result + static_cast<int64_t>(p) * m.D + c, v);
      EI_UNROLL
      for (int k = 0; k < V; ++k) total[k] = fused(v[k], weight, total[k]);
    }
    if (a.shared && c < wanted) {
      float v[V];
      load(row<X>(a.shared, r) + c, v);
      EI_UNROLL
      for (int k = 0; k < V; ++k) total[k] += v[k];
    }
    store(row<X>(a.out, r) + c, total);
  }
}

// ---- launches

// Bytes of shared memory of down_few.
template <class X, class W>
int64_t down_shared(const Moe& m) {
  return m.J * (Gemv<W>::pitch(m.F) * int64_t{sizeof(X)} + int64_t{sizeof(int)});
}

template <class X, class W>
void launch_few(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  const int64_t up_shared = Gemv<W>::pitch(m.D) * int64_t{sizeof(X)};
  require_shared("moe_matmul", "x", a.x, up_shared);
  require_shared("moe_matmul", "ids", a.ids, down_shared<X, W>(m));
  const dim3 up = grid_of_rows(ceil_div(m.F, Gemv<W>::kBlockOutputs), int64_t{m.R} * m.J);
  const dim3 down = grid_of_rows(ceil_div(m.D, Gemv<W>::kBlockOutputs), m.R);
  launch_early(call, up_few<X, W>, up, kGemvThreads, up_shared, a, m);
  launch_early(call, down_few<X, W>, down, kGemvThreads, down_shared<X, W>(m), a, m);
}

template <class Shape, class W>
void launch_shape(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  const int64_t shared = Shape::template kShared<W>;
  launch_early(call, grouped<Shape, W, true>, expert_grid<Shape>(m, m.F), Shape::kThreads, shared,
               a, m);
  launch_early(call, grouped<Shape, W, false>, expert_grid<Shape>(m, m.D), Shape::kThreads, shared,
               a, m);
}

template <class W>
void launch_many(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  launch_sort(a, m, call);
  with_shape_of_experts(m, call, [&](auto shape) { launch_shape<decltype(shape), W>(a, m, call); });
  launch_combine(a, m, call);
}

template <class W>
void launch_weight(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  if (a.x.dtype == DType::f32) return launch_few<float, W>(a, m, call);
  if constexpr (!std::is_same_v<W, float>) {
    const bool few = m.R <= kGemvRows && down_shared<bf16, W>(m) <= kLeastShared - kFewStatic;
    few && !call.batch_invariant ? launch_few<bf16, W>(a, m, call) : launch_many<W>(a, m, call);
  }
}

void launch_moe_matmul(const MoeMatmulArgs& a, const CudaCall& call) {
  require_aligned_rows(a);
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

void launch_sort(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  launch_early(call, sort, dim3(m.E), kSortThreads, 0, a, m);
}
void launch_combine(const MoeMatmulArgs& a, const Moe& m, const CudaCall& call) {
  launch_early(call, a.x.dtype == DType::bf16 ? combine<bf16> : combine<float>, dim3(m.R),
               kCombineThreads, 0, a, m);
}

}  // namespace ei::cuda
