// E4M3 and float16 as the cache stores them, and stochastic rounding to float16: the definitions
// that vector code and CUDA kernels reproduce bit for bit.
#pragma once
#include <cstdint>
#include <cstring>

#include "host/tensor.h"
#include "numbers/codes.h"

namespace ei {

EI_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
EI_HOST_DEVICE inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

constexpr uint32_t kSignless = 0x7fffffffu, kInfinityBits = 0x7f800000u;

EI_HOST_DEVICE inline float to_float(e4m3 code) { return e4m3_to_float(code.bits); }

// To nearest, ties to even; beyond 448 (infinity too) becomes 448, any NaN 0x7f.
EI_HOST_DEVICE inline void from_float(float x, e4m3& out) {
  out.bits = x != x ? kE4m3Nan : e4m3_from_float(x);
}

// Exact.
EI_HOST_DEVICE inline float to_float(f16 half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16, low = half.bits & 0x7fffu;
  if (low < 0x400) return bits_float(sign | float_bits(static_cast<float>(low) * 5.9604645e-8f));
  if (low >= 0x7c00) return bits_float(sign | kInfinityBits | low << 13);
  return bits_float(sign | ((low << 13) + (112u << 23)));
}

// ---- stochastic rounding of Mamba states
//
// A value between two neighbours of float16 becomes the upper one with the probability that its
// distance to the lower one tells, so that the mean of what is stored is the value itself: a state
// that decays slowly does not lose what each token adds, as it does when rounded to nearest. The
// random number is a function of (seed, position, head, element) alone: the same sequence gives the
// same bits wherever, beside whatever, and however often it is run.

// The key of one head at one position: two rounds of the finaliser of Steele, Lea and Flood's
// SplitMix64 ("Fast splittable pseudorandom number generators").
EI_HOST_DEVICE inline uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
EI_HOST_DEVICE inline uint32_t rounding_key(uint32_t seed, uint32_t position, uint32_t head) {
  return static_cast<uint32_t>(mix64(mix64(static_cast<uint64_t>(seed) << 32 | position) + head));
}

// The random word of element i (row * N + column of the head's state) is random_word(key + i):
// Wellons' "lowbias32", a bijection of 32 bits whose worst avalanche bias is 0.17 % of a bit.
EI_HOST_DEVICE inline uint32_t random_word(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// x rounded by the low 13 bits of `word`. Beyond 65504 + what rounding adds: infinity.
EI_HOST_DEVICE inline f16 round_stochastic(float x, uint32_t word) {
  constexpr uint32_t kLeast = 0x38800000u;  // 2^-14, the smallest normal float16
  const uint32_t u = float_bits(x), size = u & kSignless, sign = u >> 16 & 0x8000u;
  const bool small = size < kLeast;
  // Added to 2^-14, a smaller value loses the bits that float16 keeps none of, like a normal one.
  const uint32_t kept =
      (small ? float_bits(bits_float(size) + bits_float(kLeast)) : size) + (word & 0x1fffu);
  const uint32_t most = kept < 0x47800000u ? kept : 0x47800000u;
  const uint32_t code = (most >> 13) - (small ? 0x1c400u : 0x1c000u);
  return {static_cast<uint16_t>(sign | (size > kInfinityBits ? 0x7e00u : code))};
}

}  // namespace ei
