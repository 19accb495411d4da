// fp8_quantize: codes = e4m3(x / scale) with one float32 scale, in float32, rounded to nearest with
// ties to even, saturating. A weight is then decoded code * scale.
// Source: ModelOpt's FP8 (its weight_scale is amax of the tensor / 448).
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct Fp8QuantizeArgs {
  Tensor weight;  // [N, K] f32 or bf16, rows dense
  Tensor codes;   // [N, K] u8, rows dense
  float scale;    // > 0
};

EI_CPU_KERNEL(fp8_quantize, Fp8QuantizeArgs)

}  // namespace ei
