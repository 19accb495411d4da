// rms_norm: residual += delta (rounded), then
//   out[r, c] = residual[r, c] * rsqrt(mean over c' < n of residual[r, c']^2 + eps) * weight[c]
// for c < n, and 0 for c >= n, with n = sizes[row_width[r]] (D without row_width).
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct RmsNormArgs {
  Tensor residual;   // [R, D] f32 or bf16; updated when delta is given
  Tensor delta;      // [R, D], may be absent
  Tensor weight;     // [D] f32 or bf16
  Tensor out;        // [R, D]
  Tensor row_width;  // [R] i32, may be absent
  Tensor sizes;      // [W] i32
  float eps;
};

EI_CPU_KERNEL(rms_norm, RmsNormArgs)

}  // namespace ei
