// Computes: moe_route (moe_route.h).
// Layout: gate in row-major float tiles (gemv.cuh).
// Work split: one kernel for the scores, a warp two experts of up to 4 rows of x; one for the
// choice, a
//   warp per row, whose lanes keep every 32nd candidate and agree on the best J times.
//   Under batch_invariant one row takes the kernel of 4 rows too: more arithmetic, the same reads.
// Order: logits by lane, then lanes by butterfly; the chosen scores are summed in descending order
//   of selection. Everything is float32: rounding the scores would change the choice.
// Shared memory: 4 rows of x; then the candidates of 4 rows.
// Workspace: [R, E] scores in float.
// Limits: x starts its rows at multiples of 16 bytes; k sizes are multiples of 16.
// Speed: not yet measured on a GPU. Floor: the gate's prefix read once.
// Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", section 2.1, with one group.
#include "cuda/gemv.cuh"
#include "cuda/launch.cuh"
#include "moe_route.h"

namespace ei::cuda {
namespace {

using Gate = Gemv<float>;
constexpr int kChoiceWarps = 4;

EI_DEVICE int columns_of(const MoeRouteArgs& a, int64_t r) {
  return active_size(a.row_width, a.k_sizes, r, a.x.shape[1]);
}
EI_DEVICE int experts_of(const MoeRouteArgs& a, int64_t r) {
  return active_size(a.row_width, a.e_sizes, r, a.bias.shape[0]);
}

// Where the gate's row of an expert is in its K tile 0.
EI_DEVICE const float* gate_row(const MoeRouteArgs& a, int e) {
  return a.gate.ptr<float>() + (e / kTile * a.gate.shape[1] * kTile + e % kTile) * kTile;
}

// scores[r, e] = sigmoid(x[r] . gate[e]) for R rows.
template <int R, class X>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks)
    score(const __grid_constant__ MoeRouteArgs a, float* scores, bool early) {
  EI_DYNAMIC_SHARED(X, x);
  const int64_t first_row = row_of_grid() * R;  // beyond the rows: nothing is wanted
  const int rows = static_cast<int>(min(static_cast<int64_t>(R), a.x.shape[0] - first_row));
  int columns = 0, experts = 0;
  for (int r = 0; r < rows; ++r) {
    columns = max(columns, columns_of(a, first_row + r));
    experts = max(experts, experts_of(a, first_row + r));
  }
  const int first = blockIdx.x * Gate::kBlockOutputs;
  if (early && first < experts) prefetch_weights<float>(gate_row(a, first), columns);
  begin_kernel();
  if (first >= experts) return;
  const int pitch = (columns + kTile - 1) / kTile * kTile;
  for (int r = 0; r < R; ++r) {
    const int own = r < rows ? columns_of(a, first_row + r) : 0;
    stage_row(x + r * pitch, own ? row<X>(a.x, first_row + r) : x, own, pitch);
  }
  __syncthreads();
  const int of_warp = first + threadIdx.x / kWarp * Gate::kOutputs;
  if (of_warp >= experts) return;
  float logits[R];
  Gate::dot<R>(gate_row(a, of_warp), x, pitch, columns, logits);
  const int lane = threadIdx.x % kWarp, e = of_warp + lane / Gate::kLanes;
  if (lane % Gate::kLanes != 0 || e >= a.bias.shape[0]) return;
  EI_UNROLL
  for (int r = 0; r < R; ++r)
    if (r < rows)
      scores[(first_row + r) * a.bias.shape[0] + e] = divide_fast(1.0f, 1.0f + expf(-logits[r]));
}

struct Best {
  float value;
  int expert;
};
EI_DEVICE bool better(const Best& a, const Best& b) {
  return a.value > b.value || (a.value == b.value && a.expert < b.expert);
}
template <int kMask>
EI_DEVICE void take_better(Best& mine) {
  const Best other{shuffle_xor<kMask>(mine.value), shuffle_xor<kMask>(mine.expert)};
  if (better(other, mine)) mine = other;
}

__global__ void __launch_bounds__(kChoiceWarps* kWarp)
    choose(const __grid_constant__ MoeRouteArgs a, const float* scores) {
  begin_kernel();
  EI_DYNAMIC_SHARED(float, candidates);
  const int E = static_cast<int>(a.bias.shape[0]), J = static_cast<int>(a.ids.shape[1]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kChoiceWarps + warp;
  if (r >= a.x.shape[0]) return;
  const int n = experts_of(a, r);
  const float* score = scores + r * E;
  float* select = candidates + warp * E;
  // A score that is not a number is never preferred, but its weight shows it; NaN marks the chosen.
  for (int e = lane; e < n; e += kWarp) {
    const float s = score[e] + a.bias.ptr<float>()[e];
    select[e] = s == s ? s : -INFINITY;
  }
  int32_t* ids = row<int32_t>(a.ids, r);
  float total = 0.0f;
  for (int j = 0; j < J; ++j) {
    Best best{-INFINITY, INT32_MAX};
    for (int e = lane; e < n; e += kWarp)
      if (better({select[e], e}, best)) best = {select[e], e};
    take_better<16>(best);
    take_better<8>(best);
    take_better<4>(best);
    take_better<2>(best);
    take_better<1>(best);
    if (best.expert % kWarp == lane) select[best.expert] = NAN;
    if (lane == 0) ids[j] = best.expert;
    total += score[best.expert];
  }
  sync_warp();  // lane 0 wrote the ids
  for (int j = lane; j < J; j += kWarp)
    row<float>(a.weights, r)[j] = score[ids[j]] / (total + 1e-20f) * a.scaling_factor;
}

template <class X>
void launch_scores(const MoeRouteArgs& a, const CudaCall& call, float* scores) {
  const int64_t R = a.x.shape[0], pitch = ceil_div(a.x.shape[1], kTile) * kTile;
  const int64_t row_bytes = pitch * int64_t{sizeof(X)};
  // Long rows one by one: the sums of a row are the same.
  const bool fit = kGemvRows * row_bytes <= kLeastShared - kFewStatic;
  const int per_block = (R == 1 && !call.batch_invariant) || !fit ? 1 : kGemvRows;
  require_shared("moe_route", "x", a.x, per_block * row_bytes);
  const dim3 grid =
      grid_of_rows(ceil_div(a.bias.shape[0], Gate::kBlockOutputs), ceil_div(R, per_block));
  launch_early(call, per_block == 1 ? score<1, X> : score<kGemvRows, X>, grid, kGemvThreads,
               per_block * row_bytes, a, scores, call.dependent_launch);
}

int64_t workspace_bytes(const MoeRouteArgs& a, const CudaCall&) {
  return a.x.shape[0] * a.bias.shape[0] * 4;
}

void launch_moe_route(const MoeRouteArgs& a, const CudaCall& call) {
  require_aligned("moe_route", "x", a.x);
  require_aligned("moe_route", "gate", a.gate);
  float* scores = reinterpret_cast<float*>(call.workspace);
  if (a.x.dtype == DType::bf16)
    launch_scores<bf16>(a, call, scores);
  else
    launch_scores<float>(a, call, scores);
  launch_early(call, choose, dim3(static_cast<unsigned>(ceil_div(a.x.shape[0], kChoiceWarps))),
               kChoiceWarps * kWarp, kChoiceWarps * a.bias.shape[0] * 4, a,
               static_cast<const float*>(scores));
}

const RegisterCuda<MoeRouteArgs, launch_moe_route, workspace_bytes> registered("moe_route");

}  // namespace
}  // namespace ei::cuda
