// Computes: gated_norm (gated_norm.h).
// Layout: row-major rows; a group's heads are every groups-th one.
// Work split: parts are runs of rows.
// Scratch: the gated values of one row's group, as floats.
// Order: squares are summed per 64 channels of a head from zero (lanes, then pairwise), tile sums
//   by ascending channel and head.
// Limits: head_dim is a multiple of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "gated_norm.h"

#include "cpu/mamba.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

template <class T, class W>
void norm_row(const GatedNormArgs& a, int64_t row, int kept_heads, float* gated) {
  const int H = static_cast<int>(a.y.shape[1]) / a.head_dim;
  for (int group = 0; group < a.groups; ++group)
    norm_group(a.y.ptr<T>() + row * a.y.stride[0], a.z.ptr<T>() + row * a.z.stride[0],
               a.weight.ptr<W>(), a.out.ptr<T>() + row * a.out.stride[0],
               HeadGroup{H, a.head_dim, a.groups, group}, kept_heads, a.eps, gated);
}

}  // namespace

void gated_norm(const GatedNormArgs& a, Pool& pool) {
  const int64_t R = a.y.shape[0], channels = a.y.shape[1];
  const int64_t rows_per_part = std::max<int64_t>(1, 4096 / channels);
  const ActiveSizes heads{"gated_norm", a.row_width,           "row_width", a.h_sizes,
                          "h_sizes",    channels / a.head_dim, a.groups};
  pool.run((R + rows_per_part - 1) / rows_per_part, [&](int64_t part, int thread) {
    const int64_t first = part * rows_per_part;
    float* gated = reinterpret_cast<float*>(pool.scratch(thread));
    for (int64_t r = first; r < std::min(R, first + rows_per_part); ++r) {
      const int kept = heads.at(pool, r);
      if (kept < 0) continue;
      const bool y16 = a.y.dtype == DType::bf16, w16 = a.weight.dtype == DType::bf16;
      if (y16)
        w16 ? norm_row<bf16, bf16>(a, r, kept, gated) : norm_row<bf16, float>(a, r, kept, gated);
      else
        w16 ? norm_row<float, bf16>(a, r, kept, gated) : norm_row<float, float>(a, r, kept, gated);
    }
  });
}

}  // namespace ei::EI_ISA
