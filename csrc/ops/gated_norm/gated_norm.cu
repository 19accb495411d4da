// Computes: gated_norm (gated_norm.h).
// Layout: row-major rows; a group's heads are every groups-th one, each P channels side by side.
// Work split: one block per (row, group), 16 bytes per thread and pass. First pass: u = y silu(z)
//   into shared memory, and its squares; second pass: every thread scales what it stored itself.
// Order: squares by thread, ascending; then lanes by butterfly; then warps, ascending.
// Shared memory: one float per channel of the group (2 KiB at 512), one per warp.
// Limits: rows start at multiples of 16 bytes; a group has at most 24 Ki channels.
// Speed: not yet measured on a GPU. Floor: y and z read, out written.
// Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block, grouped norm).
#include "../../core/launch.cuh"
#include "../../core/rows.cuh"
#include "gated_norm.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

struct Shared {
  float sums[kWarps];
};

template <class T, class W>
__global__ void __launch_bounds__(kThreads) norm(const __grid_constant__ GatedNormArgs a) {
  constexpr int V = kVector<T>;
  EI_SHARED(Shared, shared);
  EI_DYNAMIC_SHARED(float, gated);
  const int64_t r = blockIdx.x;
  const int group = blockIdx.y, G = a.groups, P = a.head_dim;
  const int H = static_cast<int>(a.y.shape[1]) / P;
  const int heads = active_size(a.row_width, a.h_sizes, r, H);
  const int kept = heads > group ? (heads - group + G - 1) / G : 0;  // of this group
  const T* y = row<T>(a.y, r);
  const T* z = row<T>(a.z, r);
  T* out = row<T>(a.out, r);
  // Channel c of the group is in the row at:
  const auto place = [&](int c) { return (c / P * G + group) * P + c % P; };

  float squares = 0.0f;
  for (int c = threadIdx.x * V; c < kept * P; c += kThreads * V) {
    float u[V], gate[V];
    load(y + place(c), u);
    load(z + place(c), gate);
    for (int i = 0; i < V; ++i) {
      u[i] *= silu(gate[i]);
      squares += u[i] * u[i];
      gated[c + i] = u[i];
    }
  }
  const float total = sum_block(squares, shared.sums);
  const float scale = 1.0f / sqrtf(total / static_cast<float>(kept * P) + a.eps);
  const W* weight = a.weight.ptr<W>();
  for (int c = threadIdx.x * V; c < H / G * P; c += kThreads * V) {
    const int at = place(c);
    float v[V] = {};  // heads that are not kept: a matmul reads exact zeros there
    if (c < kept * P)
      for (int i = 0; i < V; ++i) v[i] = to_float(weight[at + i]) * (gated[c + i] * scale);
    store(out + at, v);
  }
}

void launch_gated_norm(const GatedNormArgs& a, const CudaCall& call) {
  require_aligned("gated_norm", "y", a.y);
  require_aligned("gated_norm", "z", a.z);
  require_aligned("gated_norm", "out", a.out);
  const dim3 grid(static_cast<unsigned>(a.y.shape[0]), static_cast<unsigned>(a.groups));
  const int64_t shared = a.y.shape[1] / a.groups * 4;
  const bool w16 = a.weight.dtype == DType::bf16;
  if (a.y.dtype == DType::bf16)
    launch(call, w16 ? norm<bf16, bf16> : norm<bf16, float>, grid, kThreads, shared, a);
  else
    launch(call, w16 ? norm<float, bf16> : norm<float, float>, grid, kThreads, shared, a);
}

const RegisterCuda<GatedNormArgs, launch_gated_norm> registered("gated_norm");

}  // namespace
}  // namespace ei::cuda
