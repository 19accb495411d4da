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

}  // namespace ei::EI_ISA
