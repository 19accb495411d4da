// mamba_step: what lies between the two projections of a Mamba layer, for one token of each
// sequence: causal_conv over xbc, ssm_step with its outputs x | B | C, then gated_norm of y with z:
//   c = silu(conv_bias + conv_weight . (conv_state, xbc));  xbc joins conv_state
//   h = exp(-exp(A_log) dt') h + (dt' x) B^T;  y = h C + D x;  dt' = softplus(dt + dt_bias)
//   u = y silu(z);  out = u rsqrt(mean of u^2 over the group's kept channels + eps) norm_weight
// c and y are rounded to the dtype of xbc, as those three ops do. Heads n < h_sizes[seq_width[s]]
// are computed and their history and state updated; of these n < out_sizes[...] are kept in `out`,
// which is exact 0 elsewhere. A sequence whose slot is -1 gets a row of zeros; nothing else of it
// is touched.
#pragma once
#include "host/isa.h"
#include "host/ssm.h"
#include "host/tensor.h"

namespace ei {

struct MambaStepArgs {
  SsmArgs ssm;         // x, B and C: columns of xbc, before the convolution; y: `out`
  Tensor z;            // [S, H*P], dtype of xbc
  Tensor conv_weight;  // [C, 4] f32 or the dtype of xbc; C = H*P + 2*G*N
  Tensor conv_bias;    // [C], dtype of conv_weight
  Tensor conv_state;   // [slots, C, 3], dtype of xbc; updated
  Tensor norm_weight;  // [H*P] f32 or bf16
  Tensor out_sizes;    // [W] i32, at most h_sizes
  Tensor arrivals;     // [S, G] i32 zeros, and zeros again when it ends
  float eps;
};

EI_CPU_KERNEL(mamba_step, MambaStepArgs)

}  // namespace ei
