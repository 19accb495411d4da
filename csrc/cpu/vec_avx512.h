// Vector primitives for AVX-512 (F, BW, VL, DQ) with BF16, VNNI and VBMI: 16 floats in a register.
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
  static V load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // Shifted into float16 a code has 2^-8 of its value, and NaN is 1.875.
  static V load(const e4m3* p) {
    const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i top = _mm256_slli_epi16(_mm256_cvtepu8_epi16(code), 8);
    const __m256i half =
        _mm256_and_si256(_mm256_srai_epi16(top, 1), _mm256_set1_epi16(static_cast<short>(0xbfff)));
    const __m512 f = _mm512_cvtph_ps(half);
    const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_abs_ps(f), _mm512_set1_ps(1.875f), _CMP_EQ_OQ);
    return {_mm512_mask_mul_ps(_mm512_or_ps(f, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))),
                               ~nan, f, _mm512_set1_ps(256.0f))};
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
// Lane i by round_stochastic(a[i], random_word(key + i)).
inline void store_stochastic(f16* p, V a, uint32_t key) {
  const auto all = [](uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); };
  const auto mix = [](__m512i x, int by) { return _mm512_xor_si512(x, _mm512_srli_epi32(x, by)); };
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i word = _mm512_mullo_epi32(mix(_mm512_add_epi32(all(key), lane), 16), all(0x7feb352du));
  word = mix(_mm512_mullo_epi32(mix(word, 15), all(0x846ca68bu)), 16);
  const __m512i u = _mm512_castps_si512(a.v), size = _mm512_and_si512(u, all(kSignless));
  const __mmask16 small = _mm512_cmplt_epu32_mask(size, all(0x38800000u));
  const __m512 sized = _mm512_castsi512_ps(size);
  const __m512 moved =
      _mm512_mask_add_ps(sized, small, sized, _mm512_castsi512_ps(all(0x38800000u)));
  __m512i kept = _mm512_add_epi32(_mm512_castps_si512(moved), _mm512_and_si512(word, all(0x1fffu)));
  kept = _mm512_srli_epi32(_mm512_min_epu32(kept, all(0x47800000u)), 13);
  __m512i code =
      _mm512_sub_epi32(kept, _mm512_mask_blend_epi32(small, all(0x1c000u), all(0x1c400u)));
  code =
      _mm512_mask_mov_epi32(code, _mm512_cmpgt_epu32_mask(size, all(kInfinityBits)), all(0x7e00u));
  code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(u, 16), all(0x8000u)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(code));
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

// kLanes pairs of bf16.
struct Pairs {
  __m512i v;
};
inline void store(uint32_t* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
inline V dot_pairs(V acc, Pairs w, uint32_t x) {
  const __m512i xv = _mm512_set1_epi32(static_cast<int>(x));
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)xv)};
}
inline void halves(Pairs p, V& even, V& odd) {
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(p.v, 16));
  odd.v =
      _mm512_castsi512_ps(_mm512_and_si512(p.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// What block scales, and their products with codes, as given below, lack to their values.
constexpr float kScaleFactor = 256.0f, kBlockFactor = kScaleFactor;
// kLanes block scales / 2^8: E4M3 is float16 with a smaller exponent (they are not negative).
inline V e4m3_scales(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7))};
}
// Values of E2M1 as bf16, twice: an index's fifth bit belongs to the next code.
struct E2m1Table {
  alignas(64) uint16_t v[32] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  //
                                0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,  //
                                0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,  //
                                0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
};
// 8 columns of kLanes rows of an NVFP4 tile, as pairs.
inline void e2m1_pairs(const uint32_t* p, Pairs* out) {
  static constexpr E2m1Table table;
  const __m512i t = _mm512_load_si512(table.v), v = _mm512_loadu_si512(p);
  out[0].v = _mm512_permutexvar_epi16(v, t);
  out[1].v = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), t);
  out[2].v = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), t);
  out[3].v = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), t);
}
// The same as floats.
inline void e2m1_floats(const uint32_t* p, V* out) {
  Pairs pairs[4];
  e2m1_pairs(p, pairs);
  for (int s = 0; s < 4; ++s) halves(pairs[s], out[2 * s], out[2 * s + 1]);
}
// kLanes groups of four bytes, and sums of their products.
struct Bytes {
  __m512i v;
  static Bytes load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
};
struct Ints {
  __m512i v;
  static Ints set(int32_t x) { return {_mm512_set1_epi32(x)}; }
};
inline void store(uint32_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline V to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
// acc + the products of four bytes w, not negative, with the four signed bytes of x, in every lane.
inline Ints dot_bytes(Ints acc, Bytes w, uint32_t x) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(static_cast<int>(x)))};
}
// 8 columns of kLanes rows of an NVFP4 tile, in the order of kByteOrder: twice the value + 12. The
// table holds them four times: an index's upper bits belong to the next code.
inline void e2m1_bytes(const uint32_t* p, Bytes* out) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1Bytes)));
  const __m512i v = _mm512_loadu_si512(p);
  out[0].v = _mm512_permutexvar_epi8(v, table);
  out[1].v = _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), table);
}
// The 16 values at v times `inverse` as whole numbers, in the order of kByteOrder. Gives their sum.
inline int store_bytes(int8_t* p, const float* v, float inverse) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(v), _mm512_set1_ps(inverse)));
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q), order));
  return _mm512_reduce_add_epi32(q);
}
// The E4M3 values in the high bytes of the 16-bit lanes, as bf16.
inline __m512i e4m3_high_bytes(__m512i v) {
  // Multiples of 2^-9 by the mantissa; an index is that alone where the exponent is zero.
  static constexpr struct {
    alignas(64) uint16_t v[32] = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  } subnormal;
  const __m512i places = _mm512_set1_epi16(static_cast<short>(0x87f0));
  const __m512i kept = _mm512_and_si512(_mm512_srai_epi16(v, 4), places);
  __m512i r = _mm512_add_epi16(kept, _mm512_set1_epi16(120 << 7));
  const __mmask32 small = _mm512_testn_epi16_mask(v, _mm512_set1_epi16(0x7800));
  r = _mm512_mask_permutexvar_epi16(r, small, _mm512_srli_epi16(v, 8),
                                    _mm512_load_si512(subnormal.v));
  // r | (v & sign)
  return _mm512_ternarylogic_epi32(r, v, _mm512_set1_epi16(static_cast<short>(0x8000)), 0xf8);
}
// 4 columns of kLanes rows of an FP8 tile, as pairs.
inline void e4m3_pairs(const uint32_t* p, Pairs* out) {
  const __m512i v = _mm512_loadu_si512(p);
  out[0].v = e4m3_high_bytes(_mm512_slli_epi16(v, 8));
  out[1].v = e4m3_high_bytes(v);
}
// The same as floats.
inline void e4m3_floats(const uint32_t* p, V* out) {
  Pairs pairs[2];
  e4m3_pairs(p, pairs);
  for (int s = 0; s < 2; ++s) halves(pairs[s], out[2 * s], out[2 * s + 1]);
}

// How to pick 16 of 48 values in three vectors: from the first two, then from the third.
struct Pick {
  alignas(64) int low[16];
  alignas(64) int high[16];
  unsigned short from_third;
};
// Every third value from k on; or, `back`, the k-th 16 values of three vectors put side by side.
constexpr Pick pick_of_three(int k, bool back) {
  Pick p{};
  for (int i = 0; i < 16; ++i) {
    const int at = 16 * k + i, index = back ? at / 3 + 16 * (at % 3) : 3 * i + k;
    p.low[i] = index & 31;
    p.high[i] = index & 15;
    if (index >= 32) p.from_third = static_cast<unsigned short>(p.from_third | 1 << i);
  }
  return p;
}
template <int K, bool Back>
inline V pick(V a, V b, V c) {
  static constexpr Pick p = pick_of_three(K, Back);
  const __m512 ab = _mm512_permutex2var_ps(a.v, _mm512_load_si512(p.low), b.v);
  return {_mm512_mask_permutexvar_ps(ab, p.from_third, _mm512_load_si512(p.high), c.v)};
}
inline void load_threes(V a, V b, V c, V* out) {
  out[0] = pick<0, false>(a, b, c);
  out[1] = pick<1, false>(a, b, c);
  out[2] = pick<2, false>(a, b, c);
}
inline void store_threes(const V* in, V* out) {
  out[0] = pick<0, true>(in[0], in[1], in[2]);
  out[1] = pick<1, true>(in[0], in[1], in[2]);
  out[2] = pick<2, true>(in[0], in[1], in[2]);
}
// Every fourth value of 64, from the first to the fourth on.
inline void load_fours(const float* p, V* out) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
  const __m512 c = _mm512_loadu_ps(p + 32), d = _mm512_loadu_ps(p + 48);
  const __m512 e0 = _mm512_permutex2var_ps(a, even, b), e1 = _mm512_permutex2var_ps(c, even, d);
  const __m512 o0 = _mm512_permutex2var_ps(a, odd, b), o1 = _mm512_permutex2var_ps(c, odd, d);
  out[0].v = _mm512_permutex2var_ps(e0, even, e1);
  out[1].v = _mm512_permutex2var_ps(o0, even, o1);
  out[2].v = _mm512_permutex2var_ps(e0, odd, e1);
  out[3].v = _mm512_permutex2var_ps(o0, odd, o1);
}

}  // namespace ei::EI_ISA
