// Vector primitives for AVX2 with FMA: 8 floats in one register.
#pragma once
#include <immintrin.h>

namespace ei::EI_ISA {

struct V {
  static constexpr int kLanes = 8;
  static constexpr bool kPairs = false;  // no bf16 dot product: widen to float first
  __m256 v;
  static V set(float x) { return {_mm256_set1_ps(x)}; }
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static V load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static V load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  // Shifted into float16 a code has 2^-8 of its value, and NaN is 1.875.
  static V load(const e4m3* p) {
    const __m128i code = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i top = _mm_slli_epi16(_mm_cvtepu8_epi16(code), 8);
    const __m128i half =
        _mm_and_si128(_mm_srai_epi16(top, 1), _mm_set1_epi16(static_cast<short>(0xbfff)));
    const __m256 f = _mm256_cvtph_ps(half);
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), f);
    const __m256 nan = _mm256_cmp_ps(size, _mm256_set1_ps(1.875f), _CMP_EQ_OQ);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return {_mm256_or_ps(_mm256_mul_ps(f, _mm256_set1_ps(256.0f)), _mm256_and_ps(nan, quiet))};
  }
};

inline V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V round(V a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n for integral n in [-127, 129], in two factors so that neither overflows.
inline V scale_by_power_of_two(V p, V n) {
  const __m256i e = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(e, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
  return mul(mul(p, {_mm256_castsi256_ps(a)}), {_mm256_castsi256_ps(b)});
}
inline V select_less(V a, V b, V yes, V no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline V propagate_nan(V x, V p) {
  return {_mm256_blendv_ps(p.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
inline void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, V a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
// Lane i by round_stochastic(a[i], random_word(key + i)).
inline void store_stochastic(f16* p, V a, uint32_t key) {
  const auto all = [](uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); };
  const auto mix = [](__m256i x, int by) { return _mm256_xor_si256(x, _mm256_srli_epi32(x, by)); };
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  __m256i word = _mm256_mullo_epi32(mix(_mm256_add_epi32(all(key), lane), 16), all(0x7feb352du));
  word = mix(_mm256_mullo_epi32(mix(word, 15), all(0x846ca68bu)), 16);
  // Signed comparisons will do: nothing compared has its top bit set.
  const __m256i u = _mm256_castps_si256(a.v), size = _mm256_and_si256(u, all(kSignless));
  const __m256i small = _mm256_cmpgt_epi32(all(0x38800000u), size);
  const __m256 least = _mm256_castsi256_ps(_mm256_and_si256(small, all(0x38800000u)));
  const __m256 moved = _mm256_add_ps(_mm256_castsi256_ps(size), least);
  __m256i kept = _mm256_add_epi32(_mm256_castps_si256(moved), _mm256_and_si256(word, all(0x1fffu)));
  kept = _mm256_srli_epi32(_mm256_min_epu32(kept, all(0x47800000u)), 13);
  __m256i code = _mm256_sub_epi32(kept, _mm256_blendv_epi8(all(0x1c000u), all(0x1c400u), small));
  code = _mm256_blendv_epi8(code, all(0x7e00u), _mm256_cmpgt_epi32(size, all(kInfinityBits)));
  code = _mm256_or_si256(code, _mm256_and_si256(_mm256_srli_epi32(u, 16), all(0x8000u)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(code, code), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
// Lanes added pairwise: ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_lane(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline void load_pairs(const uint32_t* p, V& even, V& odd) {
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
  odd.v =
      _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline V dot_pairs(V acc, const uint32_t* w, uint32_t x) {
  V we, wo;
  load_pairs(w, we, wo);
  const __m256i xv = _mm256_set1_epi32(static_cast<int>(x));
  const V xe{_mm256_castsi256_ps(_mm256_slli_epi32(xv, 16))};
  const V xo{
      _mm256_castsi256_ps(_mm256_and_si256(xv, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  return fma(wo, xo, fma(we, xe, acc));
}

// Never called: without a bf16 dot product codes become floats.
struct Pairs {};
void e2m1_pairs(const uint32_t* p, Pairs* out);
void e4m3_pairs(const uint32_t* p, Pairs* out);
void store(uint32_t* p, const Pairs& a);

// What block scales, and their products with codes, as given below, lack to their values: codes
// come doubled, scales divided by 2^8.
constexpr float kScaleFactor = 256.0f, kBlockFactor = 128.0f;
// kLanes block scales / 2^8: E4M3 is float16 with a smaller exponent (they are not negative).
inline V e4m3_scales(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7))};
}
template <int Byte>
inline V signed_byte(__m256i v) {
  if constexpr (Byte < 3) v = _mm256_slli_epi32(v, 24 - 8 * Byte);
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(v, 24))};
}
// 8 columns of kLanes rows of an NVFP4 tile as floats, doubled.
inline void e2m1_floats(const uint32_t* p, V* out) {
  const __m256i twice = _mm256_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12, 0,
                                         1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i low = _mm256_shuffle_epi8(twice, _mm256_and_si256(v, nibble));
  const __m256i high =
      _mm256_shuffle_epi8(twice, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
  out[0] = signed_byte<0>(low);
  out[1] = signed_byte<2>(low);
  out[2] = signed_byte<0>(high);
  out[3] = signed_byte<2>(high);
  out[4] = signed_byte<1>(low);
  out[5] = signed_byte<3>(low);
  out[6] = signed_byte<1>(high);
  out[7] = signed_byte<3>(high);
}
// kLanes groups of four bytes, and sums of their products.
struct Bytes {
  __m256i v;
  static Bytes load(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
};
struct Ints {
  __m256i v;
  static Ints set(int32_t x) { return {_mm256_set1_epi32(x)}; }
};
inline void store(uint32_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline V to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
// acc + the products of four bytes w in 0..24 with the four signed bytes of x, in every lane: two
// products fit 16 bits.
inline Ints dot_bytes(Ints acc, Bytes w, uint32_t x) {
  const __m256i two = _mm256_maddubs_epi16(w.v, _mm256_set1_epi32(static_cast<int>(x)));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(two, _mm256_set1_epi16(1)))};
}
// 8 columns of kLanes rows of an NVFP4 tile, in the order of kByteOrder: twice the value + 12.
inline void e2m1_bytes(const uint32_t* p, Bytes* out) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1Bytes)));
  const __m256i v = Bytes::load(p).v, nibble = _mm256_set1_epi8(15);
  out[0].v = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
  out[1].v = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
}
// The 16 values at v times `inverse` as whole numbers, in the order of kByteOrder. Gives their sum.
inline int store_bytes(int8_t* p, const float* v, float inverse) {
  return store_bytes_plainly(p, v, inverse);
}
template <int Byte>
inline V e4m3_byte(__m256i v) {
  if constexpr (Byte < 3) v = _mm256_slli_epi32(v, 24 - 8 * Byte);
  // Sign, exponent and mantissa in a float's places; then the exponent's other bias, exactly.
  v = _mm256_and_si256(_mm256_srai_epi32(v, 4), _mm256_set1_epi32(static_cast<int>(0x87f00000u)));
  return mul({_mm256_castsi256_ps(v)}, V::set(0x1p120f));
}
// 4 columns of kLanes rows of an FP8 tile as floats.
inline void e4m3_floats(const uint32_t* p, V* out) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out[0] = e4m3_byte<0>(v);
  out[1] = e4m3_byte<2>(v);
  out[2] = e4m3_byte<1>(v);
  out[3] = e4m3_byte<3>(v);
}

}  // namespace ei::EI_ISA
