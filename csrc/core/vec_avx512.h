// Vector primitives for AVX-512 (F, BW, VL, DQ) with BF16: 16 floats in one register.
#pragma once
#include <immintrin.h>

namespace ei::EI_ISA {

struct V {
  static constexpr int kLanes = 16;
  static constexpr bool kPairs = true;  // vdpbf16ps takes pairs of bf16
  __m512 v;
  static V set(float x) { return {_mm512_set1_ps(x)}; }
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static V load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
};

inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V round(V a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline V scale_by_power_of_two(V p, V n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline V select_less(V a, V b, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline V propagate_nan(V x, V p) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), p.v, x.v)};
}
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
// Rounded with integer arithmetic: vcvtneps2bf16 flushes subnormals, the other paths do not.
inline void store(bf16* p, V a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float max_lane(V a) { return _mm512_reduce_max_ps(a.v); }
inline void load_pairs(const uint32_t* p, V& even, V& odd) {
  const __m512i u = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
  odd.v =
      _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V dot_pairs(V acc, const uint32_t* w, uint32_t x) {
  const __m512i wv = _mm512_loadu_si512(w);
  const __m512i xv = _mm512_set1_epi32(static_cast<int>(x));
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)wv, (__m512bh)xv)};
}

}  // namespace ei::EI_ISA
