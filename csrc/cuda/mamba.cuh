// What the CUDA kernels of a Mamba layer share: a value of the convolution, and the gated norm of a
// group. `mamba_step` runs this same code, so that it gives the bits of the ops one after another.
#pragma once
#include "cuda/rows.cuh"

namespace ei::cuda {

constexpr int kTaps = 4, kHistory = kTaps - 1;

// silu(bias + weight . inputs): the history, oldest first, then the newest.
EI_DEVICE float convolved(float bias, const float (&weight)[kTaps],
                          const float (&history)[kHistory], float now) {
  float sum = bias;
  for (int k = 0; k < kHistory; ++k) sum = fused(weight[k], history[k], sum);
  return silu(fused(weight[kHistory], now, sum));
}

constexpr int kNormThreads = 128;  // that have channels; a block may have more

// Heads of group `group` of G among the first n.
EI_DEVICE int heads_of_group(int n, int group, int G) {
  return n > group ? (n - group + G - 1) / G : 0;
}

// One row's gated norm over the first `kept` of a group's H / G heads of P channels; zeros on its
// others. `out` may be y. `gated`: shared memory, a float per channel of the group; `sums`: one per
// warp. weight(c): of channel c of a row. All threads of the block come here.
template <int kWarps, class T, class Weight>
EI_DEVICE void norm_group(const T* y, const T* z, T* out, int H, int P, int G, int group, int kept,
                          float eps, const Weight& weight, float* gated, float (&sums)[kWarps]) {
  constexpr int V = kVector<T>;
  const int me = static_cast<int>(threadIdx.x) < kNormThreads ? threadIdx.x * V : INT32_MAX;
  // Channel c of the group is in the row at:
  const auto place = [&](int c) { return (c / P * G + group) * P + c % P; };
  float squares = 0.0f;
  for (int c = me; c < kept * P; c += kNormThreads * V) {
    float u[V], gate[V];
    load(y + place(c), u);
    load(z + place(c), gate);
    for (int i = 0; i < V; ++i) {
      u[i] *= silu(gate[i]);
      squares = fused(u[i], u[i], squares);
      gated[c + i] = u[i];
    }
  }
  const float total = sum_block(squares, sums);
  const float scale = 1.0f / sqrtf(total / static_cast<float>(kept * P) + eps);
  for (int c = me; c < H / G * P; c += kNormThreads * V) {
    const int at = place(c);
    float v[V] = {};  // heads that are not kept: a matmul reads exact zeros there
    if (c < kept * P)
      for (int i = 0; i < V; ++i) v[i] = weight(at + i) * (gated[c + i] * scale);
    store(out + at, v);
  }
}

}  // namespace ei::cuda
