// Arguments and checks that ssm_scan and ssm_step share. For head n of group n % G, per token:
//   dt' = softplus(dt + dt_bias)   (dt + dt_bias itself above 20)
//   h   = exp(-exp(A_log) dt') h + (dt' x) B^T        h [P, N], in the sequence's slot
//   y   = h C + D x
// All in float. A state kept in float16 is rounded stochastically (small_floats.h) after every
// token whose number in its sequence is a multiple of 64, and after the last token of the call:
// cutting a prompt at multiples of 64 changes no bit.
// for n < h_sizes[seq_width[s]]; the state and y of other heads are untouched. A sequence whose
// slot is -1 is skipped.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct SsmArgs {
  Tensor x;           // [T, H*P] f32 or bf16
  Tensor B, C;        // [T, G*N], dtype of x
  Tensor dt;          // [T, H] f32 or bf16, before bias and softplus
  Tensor A_log;       // [H] f32
  Tensor D;           // [H] f32
  Tensor dt_bias;     // [H] f32
  Tensor state;       // [slots, H, P, N] f32 or f16; updated
  Tensor y;           // [T, H*P], dtype of x
  Tensor cu_seqlens;  // [S+1] i32; absent: one token per sequence
  Tensor slots;       // [S] i32
  Tensor seq_width;   // [S] i32, may be absent
  Tensor h_sizes;     // [W] i32
  int groups;
  Tensor context{};  // [S] i32 tokens read before; may be absent with a float32 state
  int seed = 0;      // of stochastic rounding

  bool stochastic() const { return state.dtype == DType::f16; }
};
constexpr int kSsmStored = 64;  // a float16 state is rounded at multiples of this

// Refuses what the kernel could not run and fills in `groups`. `live`: index values are final.
void check_ssm(const char* op, SsmArgs& a, bool has_segments, bool live);

}  // namespace ei
