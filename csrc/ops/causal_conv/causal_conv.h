// causal_conv: depthwise convolution of width 4 over each sequence's tokens, bias and silu:
//   out[t, c] = silu(bias[c] + sum over k < 4 of weight[c, k] * x[t - 3 + k, c])
// where tokens before the sequence's first come from state[slot, c, :], oldest first, and state
// afterwards holds the last three inputs. Channels >= x_channels (B and C) are always computed; of
// the others only the first x_sizes[seq_width[s]], the rest of out and state being untouched. A
// sequence whose slot is -1 is skipped.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct CausalConvArgs {
  Tensor x;           // [T, C] f32 or bf16
  Tensor weight;      // [C, 4] f32 or bf16
  Tensor bias;        // [C], dtype of weight
  Tensor state;       // [slots, C, 3], dtype of x; updated
  Tensor out;         // [T, C], dtype of x
  Tensor cu_seqlens;  // [S+1] i32
  Tensor slots;       // [S] i32
  Tensor seq_width;   // [S] i32, may be absent
  Tensor x_sizes;     // [W] i32
  int x_channels;
};

EI_CPU_KERNEL(causal_conv, CausalConvArgs)

}  // namespace ei
