// The vector type `V` of the instruction set that this file is being compiled for, and the few
// primitives that all CPU kernels are written with. Included only by `*_cpu.cpp` (and by headers
// that they share), each of which CMake compiles once per instruction set with EI_ISA set to the
// namespace's name. x86 intrinsics live only in vec_avx2.h and vec_avx512.h.
//
// V holds kLanes floats. All kernels see sizes that are multiples of 16, so none needs masks.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers/small_floats.h"

#ifndef EI_ISA
#error "vec.h is for sources that are compiled once per instruction set"
#endif

namespace ei::EI_ISA {

// E2M1 codes as bytes that are not negative: twice the value + 12.
constexpr uint8_t kE2m1Bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
// Columns of a group of 8 in the order in which the two halves of the bytes of an NVFP4 tile's word
// hold them: the low halves, then the high ones.
constexpr int kByteOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// store_bytes() where no instruction does it: 16 values times `inverse`, to nearest, ties to even.
inline int store_bytes_plainly(int8_t* p, const float* v, float inverse) {
  int sum = 0;
  for (int i = 0; i < 16; ++i) {
    const int q = static_cast<int>(std::nearbyint(v[i / 8 * 8 + kByteOrder[i % 8]] * inverse));
    p[i] = static_cast<int8_t>(q);
    sum += q;
  }
  return sum;
}

}  // namespace ei::EI_ISA

#if defined(EI_ISA_avx512)
#include "cpu/vec_avx512.h"
#elif defined(EI_ISA_avx2)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_portable.h"
#endif

namespace ei::EI_ISA {

using ei::from_float;
using ei::to_float;
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void from_float(float x, float& out) { out = x; }
// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline void from_float(float x, bf16& out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    out.bits = static_cast<uint16_t>((u >> 16) | 0x40);
  else
    out.bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
template <class T>
inline float rounded(float x) {  // what x becomes when stored as T
  T t;
  from_float(x, t);
  return to_float(t);
}

// kLanes groups of S values that lie side by side, one vector per place in the group; and back.
template <int S, class T>
inline void load_groups(const T* p, V* out) {
  alignas(64) float place[S][V::kLanes];
  for (int i = 0; i < V::kLanes; ++i)
    for (int k = 0; k < S; ++k) place[k][i] = to_float(p[i * S + k]);
  for (int k = 0; k < S; ++k) out[k] = V::load(place[k]);
}
template <int S, class T>
inline void store_groups(T* p, const V* in) {
  alignas(64) float place[S][V::kLanes];
  for (int k = 0; k < S; ++k) store(place[k], in[k]);
  for (int i = 0; i < V::kLanes; ++i)
    for (int k = 0; k < S; ++k) from_float(place[k][i], p[i * S + k]);
}
#if defined(EI_ISA_avx512)
template <>
inline void load_groups<3>(const bf16* p, V* out) {
  load_threes(V::load(p), V::load(p + 16), V::load(p + 32), out);
}
template <>
inline void load_groups<3>(const float* p, V* out) {
  load_threes(V::load(p), V::load(p + 16), V::load(p + 32), out);
}
template <>
inline void load_groups<4>(const float* p, V* out) {
  load_fours(p, out);
}
template <>
inline void store_groups<3>(bf16* p, const V* in) {
  V side[3];
  store_threes(in, side);
  for (int i = 0; i < 3; ++i) store(p + i * 16, side[i]);
}
template <>
inline void store_groups<3>(float* p, const V* in) {
  V side[3];
  store_threes(in, side);
  for (int i = 0; i < 3; ++i) store(p + i * 16, side[i]);
}
#endif

// exp(x) for finite and infinite x, within 2 ulp: 2^n times a degree-6 polynomial on
// [-ln2/2, ln2/2]; overflows to +inf and underflows to 0.
inline V exp(V x) {
  const V clamped = min(max(x, V::set(-87.9f)), V::set(88.8f));
  const V n = round(mul(clamped, V::set(1.44269504088896341f)));
  V r = fma(n, V::set(-0.693359375f), clamped);
  r = fma(n, V::set(2.12194440e-4f), r);
  V p = V::set(1.9875691500e-4f);
  p = fma(p, r, V::set(1.3981999507e-3f));
  p = fma(p, r, V::set(8.3334519073e-3f));
  p = fma(p, r, V::set(4.1665795894e-2f));
  p = fma(p, r, V::set(1.6666665459e-1f));
  p = fma(p, r, V::set(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, V::set(1.0f)));
  p = scale_by_power_of_two(p, n);
  p = select_less(x, V::set(-87.9f), V::set(0.0f), p);
  return propagate_nan(x, p);
}

// x * sigmoid(x).
inline V silu(V x) { return div(x, add(V::set(1.0f), exp(sub(V::set(0.0f), x)))); }

}  // namespace ei::EI_ISA
