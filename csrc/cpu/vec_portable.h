// Vector primitives in plain C++: 8 floats in an array. The compiler may use any instructions of
// the baseline processor. Multiplication and addition round separately.
#pragma once

namespace ei::EI_ISA {

struct V {
  static constexpr int kLanes = 8;
  // Whether dot products take pairs of bf16 as they are (see dot_pairs).
  static constexpr bool kPairs = true;
  float v[8];
  static V set(float x) {
    V r;
    for (float& e : r.v) e = x;
    return r;
  }
  static V load(const float* p) {
    V r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static V load(const bf16* p) {
    V r;
    for (int i = 0; i < 8; ++i) {
      const uint32_t u = static_cast<uint32_t>(p[i].bits) << 16;
      std::memcpy(&r.v[i], &u, 4);
    }
    return r;
  }
  static V load(const f16* p) {
    V r;
    for (int i = 0; i < 8; ++i) r.v[i] = ei::to_float(p[i]);
    return r;
  }
  static V load(const e4m3* p) {
    V r;
    for (int i = 0; i < 8; ++i) r.v[i] = ei::to_float(p[i]);
    return r;
  }
};

template <class F>
inline V map(V a, V b, F f) {
  V r;
  for (int i = 0; i < 8; ++i) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}
inline V add(V a, V b) {
  return map(a, b, [](float x, float y) { return x + y; });
}
inline V sub(V a, V b) {
  return map(a, b, [](float x, float y) { return x - y; });
}
inline V mul(V a, V b) {
  return map(a, b, [](float x, float y) { return x * y; });
}
inline V div(V a, V b) {
  return map(a, b, [](float x, float y) { return x / y; });
}
// As the hardware instructions: the second operand when either is NaN.
inline V max(V a, V b) {
  return map(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline V min(V a, V b) {
  return map(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline V fma(V a, V b, V c) { return add(mul(a, b), c); }
inline V round(V a) {
  return map(a, a, [](float x, float) { return std::nearbyint(x); });
}
inline V scale_by_power_of_two(V p, V n) {
  return map(p, n, [](float x, float e) { return std::ldexp(x, static_cast<int>(e)); });
}
inline V select_less(V a, V b, V yes, V no) {
  V r;
  for (int i = 0; i < 8; ++i) r.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return r;
}
inline V propagate_nan(V x, V p) {
  return map(x, p, [](float a, float b) { return a == a ? b : a; });
}
inline void store(float* p, V a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(bf16* p, V a) {
  for (int i = 0; i < 8; ++i) {
    uint32_t u;
    std::memcpy(&u, &a.v[i], 4);
    p[i].bits = (u & 0x7fffffffu) > 0x7f800000u
                    ? static_cast<uint16_t>((u >> 16) | 0x40)
                    : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
}
// Lane i by round_stochastic(a[i], random_word(key + i)).
inline void store_stochastic(f16* p, V a, uint32_t key) {
  for (int i = 0; i < 8; ++i) p[i] = round_stochastic(a.v[i], random_word(key + i));
}
// Lanes added pairwise: ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float sum(V a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline float max_lane(V a) { return *std::max_element(a.v, a.v + 8); }
// kLanes pairs of bf16 (even in the low half) to two vectors of floats.
inline void load_pairs(const uint32_t* p, V& even, V& odd) {
  for (int i = 0; i < 8; ++i) {
    const uint32_t lo = p[i] << 16, hi = p[i] & 0xffff0000u;
    std::memcpy(&even.v[i], &lo, 4);
    std::memcpy(&odd.v[i], &hi, 4);
  }
}
// acc + w.even * x.even + w.odd * x.odd, for kLanes pairs of weights and one pair of x.
inline V dot_pairs(V acc, const uint32_t* w, uint32_t x) {
  V we, wo;
  load_pairs(w, we, wo);
  const uint32_t lo = x << 16, hi = x & 0xffff0000u;
  float xe, xo;
  std::memcpy(&xe, &lo, 4);
  std::memcpy(&xo, &hi, 4);
  return fma(wo, V::set(xo), fma(we, V::set(xe), acc));
}

// kLanes pairs of bf16.
struct Pairs {
  uint32_t v[8];
};
inline void store(uint32_t* p, const Pairs& a) { std::memcpy(p, a.v, sizeof a.v); }
inline V dot_pairs(V acc, const Pairs& w, uint32_t x) { return dot_pairs(acc, w.v, x); }

// What block scales, and their products with codes, as given below, lack to their values.
constexpr float kScaleFactor = 1.0f, kBlockFactor = kScaleFactor;
// kLanes block scales.
inline V e4m3_scales(const uint8_t* p) {
  V r;
  for (int i = 0; i < 8; ++i) r.v[i] = e4m3_to_float(p[i]);
  return r;
}
inline uint32_t bf16_pair(float even, float odd) {  // of values that bf16 holds exactly
  uint32_t e, o;
  std::memcpy(&e, &even, 4);
  std::memcpy(&o, &odd, 4);
  return e >> 16 | (o & 0xffff0000u);
}
// 8 columns of kLanes rows of an NVFP4 tile, as pairs.
inline void e2m1_pairs(const uint32_t* p, Pairs* out) {
  for (int s = 0; s < 4; ++s)
    for (int i = 0; i < 8; ++i)
      out[s].v[i] =
          bf16_pair(e2m1_to_float(p[i] >> (4 * s) & 15), e2m1_to_float(p[i] >> (16 + 4 * s) & 15));
}
// The same as floats.
inline void e2m1_floats(const uint32_t* p, V* out) {
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 8; ++i) out[k].v[i] = e2m1_to_float(p[i] >> (k % 2 * 16 + k / 2 * 4) & 15);
}
// kLanes groups of four bytes, and sums of their products.
struct Bytes {
  uint32_t v[8];
  static Bytes load(const uint32_t* p) {
    Bytes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
};
struct Ints {
  int32_t v[8];
  static Ints set(int32_t x) {
    Ints r;
    for (int32_t& e : r.v) e = x;
    return r;
  }
};
inline void store(uint32_t* p, const Bytes& a) { std::memcpy(p, a.v, sizeof a.v); }
inline V to_floats(Ints a) {
  V r;
  for (int i = 0; i < 8; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
// acc + the products of four bytes w, not negative, with the four signed bytes of x, in every lane.
inline Ints dot_bytes(Ints acc, const Bytes& w, uint32_t x) {
  for (int i = 0; i < 8; ++i)
    for (int b = 0; b < 32; b += 8)
      acc.v[i] += static_cast<int>(w.v[i] >> b & 255) * static_cast<int8_t>(x >> b);
  return acc;
}
// 8 columns of kLanes rows of an NVFP4 tile, in the order of kByteOrder: twice the value + 12.
inline void e2m1_bytes(const uint32_t* p, Bytes* out) {
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 8; ++i) {
      out[half].v[i] = 0;
      for (int b = 0; b < 32; b += 8)
        out[half].v[i] |= uint32_t{kE2m1Bytes[p[i] >> (b + 4 * half) & 15]} << b;
    }
}
// The 16 values at v times `inverse` as whole numbers, in the order of kByteOrder. Gives their sum.
inline int store_bytes(int8_t* p, const float* v, float inverse) {
  return store_bytes_plainly(p, v, inverse);
}
// 4 columns of kLanes rows of an FP8 tile, as pairs.
inline void e4m3_pairs(const uint32_t* p, Pairs* out) {
  for (int s = 0; s < 2; ++s)
    for (int i = 0; i < 8; ++i)
      out[s].v[i] = bf16_pair(e4m3_to_float(p[i] >> (8 * s) & 255),
                              e4m3_to_float(p[i] >> (16 + 8 * s) & 255));
}
// The same as floats.
inline void e4m3_floats(const uint32_t* p, V* out) {
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 8; ++i) out[k].v[i] = e4m3_to_float(p[i] >> (k % 2 * 16 + k / 2 * 8) & 255);
}

}  // namespace ei::EI_ISA
