// What the CPU kernels of a Mamba layer share: a token's convolution, and the gated norm of a
// group. `mamba_step` runs this same code group by group, so that it gives the bits of the ops one
// after another.
#pragma once
#include <cstring>

#include "cpu/vec.h"
#include "host/pool.h"

namespace ei::EI_ISA {

constexpr int kTaps = 4, kHistory = kTaps - 1;

// n channels of one token: out = silu(bias + weight . (state, x)), and x joins the state. All
// pointers are at the first channel; n is a multiple of 16.
template <class T, class W>
void conv_token(const T* x, const W* weight, const W* bias, T* state, T* out, int n) {
  for (int c = 0; c < n; c += V::kLanes) {
    V w[kTaps], past[kTaps];
    load_groups<kTaps>(weight + c * kTaps, w);
    load_groups<kHistory>(state + c * kHistory, past);
    past[kHistory] = V::load(x + c);
    V sum = V::load(bias + c);
    for (int k = 0; k < kTaps; ++k) sum = fma(w[k], past[k], sum);
    store(out + c, silu(sum));
    store_groups<kHistory>(state + c * kHistory, past + 1);
  }
}

// Heads n < H of a group are n = group, group + G, ...; each has P channels.
struct HeadGroup {
  int H, P, G, group;
};

// gated = y * silu(z) of one head; returns the sum of squares added to `total`.
template <class T>
float gate_head(const T* y, const T* z, float* gated, int P, float total) {
  for (int tile = 0; tile < P; tile += 64) {
    V squares = V::set(0.0f);
    for (int c = tile; c < std::min(P, tile + 64); c += V::kLanes) {
      const V u = mul(V::load(y + c), silu(V::load(z + c)));
      store(gated + c, u);
      squares = fma(u, u, squares);
    }
    total += sum(squares);
  }
  return total;
}

// One row's norm over a group's heads below `kept_heads`, zeros on its others. `gated`: room for
// the group's channels.
template <class T, class W>
void norm_group(const T* y, const T* z, const W* weight, T* out, const HeadGroup& g, int kept_heads,
                float eps, float* gated) {
  const int P = g.P;
  float total = 0.0f;
  int n = g.group, kept = 0;
  for (; n < kept_heads; n += g.G, ++kept)
    total = gate_head(y + n * P, z + n * P, gated + kept * P, P, total);
  for (; n < g.H; n += g.G) std::memset(static_cast<void*>(out + n * P), 0, P * sizeof(T));
  if (kept == 0) return;
  const V scale = V::set(1.0f / std::sqrt(total / static_cast<float>(kept * P) + eps));
  for (int i = 0; i < kept; ++i) {
    const int at = (g.group + i * g.G) * P;
    for (int c = 0; c < P; c += V::kLanes)
      store(out + at + c, mul(V::load(weight + at + c), mul(V::load(gated + i * P + c), scale)));
  }
}

}  // namespace ei::EI_ISA
