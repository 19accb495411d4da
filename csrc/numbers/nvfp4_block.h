// How 16 columns become a block of NVFP4: one rule for weights and activations, CPU and CUDA.
#pragma once
#include "numbers/codes.h"

namespace ei {

struct Nvfp4Block {
  uint8_t scale;  // E4M3; NaN, with codes of zero, where a value is not finite
  float step;     // what a code is multiplied by

  // amax: the largest absolute value of the block. g: the scale of its tensor or row.
  EI_HOST_DEVICE Nvfp4Block(float amax, bool finite, float g)
      : scale(!finite        ? kE4m3Nan
              : amax == 0.0f ? 0
                             : e4m3_from_float(amax / (kE2m1Max * g))),
        step(finite ? e4m3_to_float(scale) * g : 0.0f) {}
  EI_HOST_DEVICE uint8_t code(float x) const { return step > 0.0f ? e2m1_from_float(x / step) : 0; }
};

}  // namespace ei
