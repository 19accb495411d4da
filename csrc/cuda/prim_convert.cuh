// The part of prim.cuh (which includes it) that converts 8-bit and 16-bit floats of the cache, and
// the one operation that fuses.
#pragma once

namespace ei::cuda {

// PTX: "Data Movement and Conversion Instructions: cvt" (cvt.f32.f16), exact.
EI_DEVICE float float_from_half(uint16_t bits) {
#if defined(__CUDACC__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  return to_float(f16{bits});
#endif
}

// Two E4M3 codes as bfloat16, exactly: the first in the low byte and half.
// PTX: "Data Movement and Conversion Instructions: cvt" (cvt.rn.f16x2.e4m3x2, from sm_89 on).
EI_DEVICE uint32_t bf16_from_e4m3(uint32_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  const float low = float_from_half(static_cast<uint16_t>(halves));
  const float high = float_from_half(static_cast<uint16_t>(halves >> 16));
#else
  const float low = to_float(e4m3{static_cast<uint8_t>(codes)});
  const float high = to_float(e4m3{static_cast<uint8_t>(codes >> 8)});
#endif
  return pack_bf16(low, high);
}

// Two floats that float16 holds exactly, `low` in the low half. PTX: "cvt" (cvt.rn.f16x2.f32).
EI_DEVICE uint32_t pack_halves(float low, float high) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return round_stochastic(low, 0).bits | static_cast<uint32_t>(round_stochastic(high, 0).bits)
                                             << 16;
#endif
}

// Two floats as E4M3 codes, `low` in the low byte; beyond 448 becomes 448, NaN 0x7f.
// PTX: "cvt" (cvt.rn.satfinite.e4m3x2.f32 d, a, b puts a on top; from sm_89 on).
EI_DEVICE uint32_t pack_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  e4m3 code[2];
  from_float(low, code[0]);
  from_float(high, code[1]);
  return code[0].bits | static_cast<uint32_t>(code[1].bits) << 8;
#endif
}

// a b + c, rounded once. Kernels are compiled with --fmad=false: nothing else fuses, and what is
// written decides the bits, wherever it is inlined.
// PTX: "Floating Point Instructions: fma" (.rn).
EI_DEVICE float fused(float a, float b, float c) {
#if defined(__CUDACC__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

}  // namespace ei::cuda
