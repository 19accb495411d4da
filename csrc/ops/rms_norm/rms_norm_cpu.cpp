// Computes: rms_norm (rms_norm.h).
// Layout: row-major rows; reads and writes nothing of the residual beyond a row's own prefix.
// Work split: parts are runs of rows.
// Order: squares are summed per 64 channels from zero (lanes, then pairwise), tile sums ascending.
// Limits: D and sizes are multiples of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "rms_norm.h"

#include "cpu/vec.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

template <class T>
float sum_of_squares(const T* x, int n) {
  float total = 0.0f;
  for (int t = 0; t < n; t += 64) {
    V acc = V::set(0.0f);
    for (int c = t; c < std::min(n, t + 64); c += V::kLanes) {
      const V v = V::load(x + c);
      acc = fma(v, v, acc);
    }
    total += sum(acc);
  }
  return total;
}

template <class T, class W>
void norm_row(const RmsNormArgs& a, int64_t r, int n) {
  T* x = a.residual.ptr<T>() + r * a.residual.stride[0];
  T* out = a.out.ptr<T>() + r * a.out.stride[0];
  const W* weight = a.weight.ptr<W>();
  if (a.delta) {
    const T* d = a.delta.ptr<T>() + r * a.delta.stride[0];
    for (int c = 0; c < n; c += V::kLanes) store(x + c, add(V::load(x + c), V::load(d + c)));
  }
  const V scale = V::set(1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + a.eps));
  for (int c = 0; c < n; c += V::kLanes)
    store(out + c, mul(V::load(weight + c), mul(V::load(x + c), scale)));
  std::memset(static_cast<void*>(out + n), 0, (a.residual.shape[1] - n) * sizeof(T));
}

}  // namespace

void rms_norm(const RmsNormArgs& a, Pool& pool) {
  const int64_t R = a.residual.shape[0], D = a.residual.shape[1];
  const int64_t rows_per_part = std::max<int64_t>(1, 16384 / D);
  const ActiveSizes sizes{"rms_norm", a.row_width, "row_width", a.sizes, "sizes", D, 16};
  pool.run((R + rows_per_part - 1) / rows_per_part, [&](int64_t part, int) {
    for (int64_t r = part * rows_per_part; r < std::min(R, (part + 1) * rows_per_part); ++r) {
      const int n = sizes.at(pool, r);
      if (n < 0) continue;
      const bool x16 = a.residual.dtype == DType::bf16, w16 = a.weight.dtype == DType::bf16;
      if (x16)
        w16 ? norm_row<bf16, bf16>(a, r, n) : norm_row<bf16, float>(a, r, n);
      else
        w16 ? norm_row<float, bf16>(a, r, n) : norm_row<float, float>(a, r, n);
    }
  });
}

}  // namespace ei::EI_ISA
