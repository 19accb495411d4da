// nvfp4_quantize: weights to E2M1 codes, one E4M3 scale per 16 columns and one float32 scale g.
//
//   block_scales = e4m3(amax / (6 g)), amax: the largest magnitude of the 16
//   codes = e2m1(x / (decoded block scale * g)); where that product is zero they are zero
//
// In float32, rounded to nearest with ties to even in both formats, saturating. A weight is then
// decoded code * decoded block scale * g.
// Source: ModelOpt's NVFP4 (its weight_scale_2 is g = amax of the tensor / (6 * 448)).
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct Nvfp4QuantizeArgs {
  Tensor weight;        // [N, K] f32 or bf16, rows dense
  Tensor codes;         // [N, K/2] u8, rows dense; low four bits = even k
  Tensor block_scales;  // [N, K/16] u8, rows dense
  float scale;          // g > 0
};

EI_CPU_KERNEL(nvfp4_quantize, Nvfp4QuantizeArgs)

}  // namespace ei
