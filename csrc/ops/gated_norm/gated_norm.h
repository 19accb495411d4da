// gated_norm: with u = y * silu(z), for each group g of heads n with n % groups == g,
//   out = u * rsqrt(mean of u^2 over the group's kept channels + eps) * weight
// on the kept heads n < h_sizes[row_width[r]] (all without row_width) and exact 0 on the others,
// of which nothing is read.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct GatedNormArgs {
  Tensor y;          // [R, H*P] f32 or bf16
  Tensor z;          // [R, H*P], dtype of y
  Tensor weight;     // [H*P] f32 or bf16
  Tensor out;        // [R, H*P], dtype of y
  Tensor row_width;  // [R] i32, may be absent
  Tensor h_sizes;    // [W] i32
  int groups, head_dim;
  float eps;
};

EI_CPU_KERNEL(gated_norm, GatedNormArgs)

}  // namespace ei
