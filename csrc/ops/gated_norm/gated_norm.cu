// Computes: gated_norm (gated_norm.h).
// Layout: row-major rows; a group's heads are every groups-th one, each P channels side by side.
// Work split: one block per (row, group), 16 bytes per thread and pass. First pass: u = y silu(z)
//   into shared memory, and its squares; second pass: every thread scales what it stored itself.
// Order: squares by thread, ascending; then lanes by butterfly; then warps, ascending.
// Shared memory: one float per channel of the group (2 KiB at 512), one per warp.
// Limits: rows start at multiples of 16 bytes; a group has at most 24 Ki channels.
// Speed: not yet measured on a GPU. Floor: y and z read, out written.
// Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block, grouped norm).
#include "cuda/launch.cuh"
#include "cuda/mamba.cuh"
#include "gated_norm.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = kNormThreads, kWarps = kThreads / kWarp;

struct Shared {
  float sums[kWarps];
};

template <class T, class W>
__global__ void __launch_bounds__(kThreads) norm(const __grid_constant__ GatedNormArgs a) {
  EI_SHARED(Shared, shared);
  EI_DYNAMIC_SHARED(float, gated);
  const int64_t r = blockIdx.x;
  const int group = blockIdx.y, G = a.groups, P = a.head_dim;
  const int H = static_cast<int>(a.y.shape[1]) / P;
  const int kept = heads_of_group(active_size(a.row_width, a.h_sizes, r, H), group, G);
  const W* weight = a.weight.ptr<W>();
  norm_group(
      row<T>(a.y, r), row<T>(a.z, r), row<T>(a.out, r), H, P, G, group, kept, a.eps,
      [&](int c) { return to_float(weight[c]); }, gated, shared.sums);
}

void launch_gated_norm(const GatedNormArgs& a, const CudaCall& call) {
  require_aligned("gated_norm", "y", a.y);
  require_aligned("gated_norm", "z", a.z);
  require_aligned("gated_norm", "out", a.out);
  const dim3 grid(static_cast<unsigned>(a.y.shape[0]), static_cast<unsigned>(a.groups));
  const int64_t shared = a.y.shape[1] / a.groups * 4;
  require_shared("gated_norm", "y", a.y, shared);
  const bool w16 = a.weight.dtype == DType::bf16;
  if (a.y.dtype == DType::bf16)
    launch(call, w16 ? norm<bf16, bf16> : norm<bf16, float>, grid, kThreads, shared, a);
  else
    launch(call, w16 ? norm<float, bf16> : norm<float, float>, grid, kThreads, shared, a);
}

const RegisterCuda<GatedNormArgs, launch_gated_norm> registered("gated_norm");

}  // namespace
}  // namespace ei::cuda
