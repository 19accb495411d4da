// Computes: rms_norm (rms_norm.h).
// Layout: row-major rows, 16 bytes per thread and pass. Nothing of the residual beyond a row's own
//   prefix is read or written.
// Work split: one block per row. First pass: residual += delta, rounded, and its squares; second
//   pass: every thread re-reads what it wrote itself (from the first-level cache) and scales it.
// Order: squares by thread, ascending; then lanes by butterfly; then warps, ascending. It depends
//   on the row's own prefix alone.
// Shared memory: one float per warp.
// Limits: rows start at multiples of 16 bytes.
// Speed: not yet measured on a GPU. Floor: residual and delta read, residual and out written.
// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization".
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "rms_norm.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct Shared {
  float sums[kWarps];
};

template <class T, class W>
__global__ void __launch_bounds__(kThreads) norm(const __grid_constant__ RmsNormArgs a) {
  begin_kernel();
  constexpr int V = kVector<T>;
  EI_SHARED(Shared, shared);
  const int64_t r = blockIdx.x;
  const int D = static_cast<int>(a.residual.shape[1]);
  const int n = active_size(a.row_width, a.sizes, r, D);
  T* x = row<T>(a.residual, r);
  T* out = row<T>(a.out, r);

  float squares = 0.0f;
  for (int c = threadIdx.x * V; c < n; c += kThreads * V) {
    float v[V];
    load(x + c, v);
    if (a.delta) {
      float d[V];
      load(row<T>(a.delta, r) + c, d);
      for (int i = 0; i < V; ++i) v[i] = rounded<T>(v[i] + d[i]);
      store(x + c, v);
    }
    for (int i = 0; i < V; ++i) squares = fused(v[i], v[i], squares);
  }
  const float total = sum_block(squares, shared.sums);
  const float scale = 1.0f / sqrtf(total / static_cast<float>(n) + a.eps);
  for (int c = threadIdx.x * V; c < n; c += kThreads * V) {
    float v[V];
    load(x + c, v);
    for (int i = 0; i < V; ++i) v[i] = to_float(a.weight.ptr<W>()[c + i]) * (v[i] * scale);
    store(out + c, v);
  }
  clear_row(out, n, D, threadIdx.x, kThreads);  // a matmul reads exact zeros there
}

void launch_rms_norm(const RmsNormArgs& a, const CudaCall& call) {
  require_aligned("rms_norm", "residual", a.residual);
  require_aligned("rms_norm", "delta", a.delta);
  require_aligned("rms_norm", "out", a.out);
  const dim3 grid(static_cast<unsigned>(a.residual.shape[0]));
  const bool w16 = a.weight.dtype == DType::bf16;
  if (a.residual.dtype == DType::bf16)
    launch_early(call, w16 ? norm<bf16, bf16> : norm<bf16, float>, grid, kThreads, 0, a);
  else
    launch_early(call, w16 ? norm<float, bf16> : norm<float, float>, grid, kThreads, 0, a);
}

const RegisterCuda<RmsNormArgs, launch_rms_norm> registered("rms_norm");

}  // namespace
}  // namespace ei::cuda
