// Arguments and checks that ssm_scan and ssm_step share. For head n of group n % G, per token:
//   dt' = softplus(dt + dt_bias)   (dt + dt_bias itself above 20)
//   h   = exp(-exp(A_log) dt') h + (dt' x) B^T        h [P, N], in the sequence's slot
//   y   = h C + D x
// for n < h_sizes[seq_width[s]]; the state and y of other heads are untouched. A sequence whose
// slot is -1 is skipped.
#pragma once
#include "isa.h"
#include "tensor.h"

namespace ei {

struct SsmArgs {
  Tensor x;           // [T, H*P] f32 or bf16
  Tensor B, C;        // [T, G*N], dtype of x
  Tensor dt;          // [T, H] f32 or bf16, before bias and softplus
  Tensor A_log;       // [H] f32
  Tensor D;           // [H] f32
  Tensor dt_bias;     // [H] f32
  Tensor state;       // [slots, H, P, N] f32; updated
  Tensor y;           // [T, H*P], dtype of x
  Tensor cu_seqlens;  // [S+1] i32; absent: one token per sequence
  Tensor slots;       // [S] i32
  Tensor seq_width;   // [S] i32, may be absent
  Tensor h_sizes;     // [W] i32
  int groups;
};

// Refuses what the kernel could not run and fills in `groups`. `live`: index values are final.
void check_ssm(const char* op, SsmArgs& a, bool has_segments, bool live);

}  // namespace ei
