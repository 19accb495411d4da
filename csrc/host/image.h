// Weight images as the checks of ops see them: what their tiles hold, and the scales that go with
// it.
#pragma once
#include "host/check.h"

namespace ei {

// Refuses an image that kernels could not read in words of 16 bytes.
inline void check_image_start(const Checker& check, const Tensor& w, const char* name) {
  if (w.numel() > 0 && reinterpret_cast<uintptr_t>(w.data) % 16 != 0)
    check.fail(name, "start at a multiple of 16 bytes",
               w.describe() + " at " + std::to_string(reinterpret_cast<uintptr_t>(w.data) % 16) +
                   " beyond one");
}

// What the tiles of an image hold, from their bytes; an image that activations of x_dtype can be
// multiplied with (`x_dtype` other: any).
inline DType image_dtype(const Checker& check, const Tensor& w, const char* name,
                         DType x_dtype = DType::other) {
  const int64_t bytes = w.ndim ? w.shape[w.ndim - 1] : 0;
  check_image_start(check, w, name);
  for (const DType t : {DType::f32, DType::bf16, DType::fp8, DType::nvfp4}) {
    if (bytes != tile_bytes(t)) continue;
    if (t == DType::f32 && x_dtype == DType::bf16)
      check.fail(name, "be a bfloat16 image when x is bfloat16", "a float32 image");
    return t;
  }
  check.fail(name,
             "have tiles of 16384 (float32), 8192 (bfloat16), 4096 (FP8) or 2304 (NVFP4) bytes",
             w.describe());
}

// The scales of a quantised image, one per `letter`; absent for a float32 or bfloat16 image.
inline void check_scale(Checker& check, const Tensor& scale, const char* name, DType image,
                        const Dim& letter) {
  if (quantised(image)) {
    check(scale, name).dtype({DType::f32}).shape({letter}).contiguous();
  } else if (scale) {
    check.fail(name, std::string("be absent for a ") + dtype_name(image) + " image",
               scale.describe());
  }
}

}  // namespace ei
