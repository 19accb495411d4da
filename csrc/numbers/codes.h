// The two small float formats of quantised weights, one value at a time: E4M3 (FP8 weights and the
// block scales of NVFP4) and E2M1 (the codes of NVFP4). Rounding is to nearest, ties to even;
// values beyond the largest saturate.
//
// E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f and 0xff are NaN;
//   largest 448, smallest 2^-9.
// E2M1: sign, 2 bits of exponent (bias 1), 1 of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
// Source: OCP 8-bit floating point 1.0 and OCP microscaling formats 1.0.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "host/tensor.h"

namespace ei {

constexpr float kE4m3Max = 448.0f, kE2m1Max = 6.0f;
constexpr uint8_t kE4m3Nan = 0x7f;
constexpr int kScaleBlock = 16;     // columns that share a block scale
constexpr int kInt8TileBytes = 96;  // of 64 activations as int8 (gemm_int8.h)

EI_HOST_DEVICE inline float e4m3_to_float(uint8_t code) {
  const int magnitude = code & 0x7f;
  uint32_t u = 0x7fc00000u;
  float f;
  if (magnitude >= kE4m3Nan) {
    std::memcpy(&f, &u, 4);
  } else if (magnitude < 8) {
    f = static_cast<float>(magnitude) * 0x1p-9f;
  } else {
    u = (static_cast<uint32_t>(magnitude) << 20) + (120u << 23);
    std::memcpy(&f, &u, 4);
  }
  return code & 0x80 ? -f : f;
}

// `x` must not be NaN.
EI_HOST_DEVICE inline uint8_t e4m3_from_float(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint8_t sign = static_cast<uint8_t>((u >> 24) & 0x80);
  u &= 0x7fffffffu;
  float magnitude;
  std::memcpy(&magnitude, &u, 4);
  if (magnitude >= kE4m3Max) return sign | 0x7e;
  // Below the smallest normal a step is 2^-9; adding 2^14 leaves exactly these steps.
  if (magnitude < 0x1p-6f)
    return sign | static_cast<uint8_t>((magnitude + 0x1p14f - 0x1p14f) * 512.0f);
  const uint32_t kept = u + 0x7ffffu + ((u >> 20) & 1);
  return sign | static_cast<uint8_t>((kept >> 20) - (120u << 3));
}

EI_HOST_DEVICE inline float e2m1_to_float(uint8_t code) {
  constexpr float value[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return code & 8 ? -value[code & 7] : value[code & 7];
}

// `x` must not be NaN.
EI_HOST_DEVICE inline uint8_t e2m1_from_float(float x) {
  const float m = std::fabs(x);
  // Halfway points go to the even code: 0.25, 1.25, 2.5 and 5 down, 0.75, 1.75 and 3.5 up.
  const int code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                   (m >= 3.5f) + (m > 5.0f);
  return static_cast<uint8_t>(code | (std::signbit(x) ? 8 : 0));
}

}  // namespace ei
