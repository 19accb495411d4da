// Computes: gated_norm (gated_norm.h).
// Layout: row-major rows; a group's heads are every groups-th one.
// Work split: parts are runs of rows.
// Scratch: the gated values of one row's group, as floats.
// Order: squares are summed per 64 channels of a head from zero (lanes, then pairwise), tile sums
//   by ascending channel and head.
// Limits: head_dim is a multiple of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "gated_norm.h"

#include "../../core/pool.h"
#include "../../core/vec.h"

namespace ei::EI_ISA {
namespace {

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

template <class T, class W>
void norm_group(const GatedNormArgs& a, int64_t row, int group, int kept_heads, float* gated) {
  const int P = a.head_dim, H = static_cast<int>(a.y.shape[1]) / P;
  const T* y = a.y.ptr<T>() + row * a.y.stride[0];
  const T* z = a.z.ptr<T>() + row * a.z.stride[0];
  T* out = a.out.ptr<T>() + row * a.out.stride[0];
  const W* weight = a.weight.ptr<W>();
  float total = 0.0f;
  int n = group, kept = 0;
  for (; n < kept_heads; n += a.groups, ++kept)
    total = gate_head(y + n * P, z + n * P, gated + kept * P, P, total);
  for (; n < H; n += a.groups) std::memset(static_cast<void*>(out + n * P), 0, P * sizeof(T));
  if (kept == 0) return;
  const V scale = V::set(1.0f / std::sqrt(total / static_cast<float>(kept * P) + a.eps));
  for (int i = 0; i < kept; ++i) {
    const int at = (group + i * a.groups) * P;
    for (int c = 0; c < P; c += V::kLanes)
      store(out + at + c, mul(V::load(weight + at + c), mul(V::load(gated + i * P + c), scale)));
  }
}

}  // namespace

void gated_norm(const GatedNormArgs& a, Pool& pool) {
  const int64_t R = a.y.shape[0], channels = a.y.shape[1];
  const int64_t rows_per_part = std::max<int64_t>(1, 4096 / channels);
  pool.run((R + rows_per_part - 1) / rows_per_part, [&](int64_t part, int thread) {
    const int64_t first = part * rows_per_part;
    float* gated = reinterpret_cast<float*>(pool.scratch(thread));
    for (int64_t r = first; r < std::min(R, first + rows_per_part); ++r) {
      const int kept = a.row_width ? a.h_sizes.ptr<int32_t>()[a.row_width.ptr<int32_t>()[r]]
                                   : static_cast<int>(channels / a.head_dim);
      const bool y16 = a.y.dtype == DType::bf16, w16 = a.weight.dtype == DType::bf16;
      for (int group = 0; group < a.groups; ++group)
        if (y16)
          w16 ? norm_group<bf16, bf16>(a, r, group, kept, gated)
              : norm_group<bf16, float>(a, r, group, kept, gated);
        else
          w16 ? norm_group<float, bf16>(a, r, group, kept, gated)
              : norm_group<float, float>(a, r, group, kept, gated);
    }
  });
}

}  // namespace ei::EI_ISA
