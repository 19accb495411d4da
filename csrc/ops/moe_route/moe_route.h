// moe_route: which J experts a row goes to, and with which weights.
//   s[e] = sigmoid(sum over k < k_r of x[r, k] * gate[e, k]),  e < e_r
// ids[r] = the J experts with the largest s + bias, in descending order (ties: lowest index);
// weights[r, j] = s[ids[r, j]] / (sum over j of s + 1e-20) * scaling_factor.
// k_r = k_sizes[w], e_r = e_sizes[w], w = row_width[r]; all of D and E without row_width.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct MoeRouteArgs {
  Tensor x;          // [R, D] f32 or bf16, rows dense
  Tensor gate;       // [E tiles, D tiles, 16384] u8: float32 tiles
  Tensor bias;       // [E] f32, for the choice only
  Tensor ids;        // [R, J] i32
  Tensor weights;    // [R, J] f32
  Tensor row_width;  // [R] i32, may be absent
  Tensor k_sizes;    // [W] i32
  Tensor e_sizes;    // [W] i32
  float scaling_factor;
};

EI_CPU_KERNEL(moe_route, MoeRouteArgs)

}  // namespace ei
