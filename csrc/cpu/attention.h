// Attention of a block of query rows to one page of one KV head, shared by prefill and decode.
// Included by kernels only.
//
// Lane = row (one query head of one token), so a row's bits depend on its own values alone,
// whatever shares its block. Rows are stored in panels of at most kPanel vectors; a panel of width
// w holds q and o as [K][w], and m (running maximum) and l (running sum) as [w]. Per page:
//   s[j] = sum over c of k[j][c] * q[c], per 64 channels from zero, tile sums ascending;
//   m' = max(m, max s); p = exp(s - m'); l = l * exp(m - m') + sum p;
//   o[c] = o[c] * exp(m - m') + sum over j of p[j] * v[j][c], keys ascending from zero.
#pragma once
#include <limits>

#include "cpu/vec.h"

namespace ei::EI_ISA {

constexpr int kPage = 64;    // tokens of one page
constexpr int kPanel = 3;    // vectors of rows in one panel: 4 x 3 sums fill 12 registers
constexpr int kKeyStep = 8;  // keys of a partial page are filled up to a multiple of this

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Memory of one block of rows; `lanes` is their number, filled up to whole vectors.
struct AttentionBlock {
  float *q, *o;    // [lanes * K], panels one after the other
  float *m, *l;    // [lanes]
  float* visible;  // [lanes] keys that a row sees, from the start of the sequence
  float *k, *v;    // [64][K] the page as floats
  float* s;        // [64][kPanel * V::kLanes] scores, then probabilities, of one panel
  int lanes, K;
};

// As attention_floats() of attention_sizes.h counts it.
inline AttentionBlock place_block(float* at, int rows, int K) {
  AttentionBlock b;
  b.lanes = round_up(rows, V::kLanes);
  b.K = K;
  const auto take = [&](int64_t n) {
    float* here = at;
    at += (n + 15) / 16 * 16;
    return here;
  };
  b.k = take(kPage * K);
  b.v = take(kPage * K);
  b.s = take(kPage * kPanel * V::kLanes);
  b.q = take(static_cast<int64_t>(b.lanes) * K);
  b.o = take(static_cast<int64_t>(b.lanes) * K);
  b.m = take(b.lanes);
  b.l = take(b.lanes);
  b.visible = take(b.lanes);
  return b;
}

// Where value c of a row is: base + c * step of the q or o array.
struct RowPlace {
  int64_t base;
  int step;
};
inline RowPlace row_place(const AttentionBlock& b, int row) {
  constexpr int wide = kPanel * V::kLanes;
  const int first = row / wide * wide;
  return {static_cast<int64_t>(first) * b.K + (row - first), std::min(wide, b.lanes - first)};
}

template <class T>
inline void set_query(const AttentionBlock& b, int row, const T* q, float scale) {
  const RowPlace at = row_place(b, row);
  for (int c = 0; c < b.K; ++c)
    b.q[at.base + static_cast<int64_t>(c) * at.step] = to_float(q[c]) * scale;
}

// Starts a block: nothing seen; lanes from `rows` on are filled with zero queries.
inline void reset_block(const AttentionBlock& b) {
  std::fill(b.o, b.o + static_cast<int64_t>(b.lanes) * b.K, 0.0f);
  std::fill(b.m, b.m + b.lanes, -std::numeric_limits<float>::infinity());
  std::fill(b.l, b.l + b.lanes, 0.0f);
}
inline void fill_spare_rows(const AttentionBlock& b, int rows) {
  for (int r = rows; r < b.lanes; ++r) {
    const RowPlace at = row_place(b, r);
    for (int c = 0; c < b.K; ++c) b.q[at.base + static_cast<int64_t>(c) * at.step] = 0.0f;
    b.visible[r] = std::numeric_limits<float>::max();
  }
}

// n rows of a page as floats, zero from there to the next multiple of kKeyStep.
template <class T>
inline void load_page(const T* page, int n, int K, float* out) {
  for (int i = 0; i < n * K; i += V::kLanes) store(out + i, V::load(page + i));
  std::fill(out + n * K, out + round_up(n, kKeyStep) * K, 0.0f);
}

// s[j][lanes] of one panel for keys [0, n), n a multiple of kKeyStep.
template <int NR>
inline void panel_scores(const float* k, const float* q, int n, int K, float* s) {
  constexpr int L = V::kLanes, W = NR * L, MR = NR == 1 ? 8 : 4;
  for (int j = 0; j < n; j += MR)
    for (int tile = 0; tile < K; tile += 64) {
      V acc[MR][NR];
      for (int i = 0; i < MR; ++i)
        for (int x = 0; x < NR; ++x) acc[i][x] = V::set(0.0f);
      for (int c = tile; c < std::min(K, tile + 64); ++c) {
        V qv[NR];
        for (int x = 0; x < NR; ++x) qv[x] = V::load(q + c * W + x * L);
        for (int i = 0; i < MR; ++i) {
          const V kv = V::set(k[(j + i) * K + c]);
          for (int x = 0; x < NR; ++x) acc[i][x] = fma(qv[x], kv, acc[i][x]);
        }
      }
      for (int i = 0; i < MR; ++i)
        for (int x = 0; x < NR; ++x) {
          float* to = s + (j + i) * W + x * L;
          store(to, tile == 0 ? acc[i][x] : add(V::load(to), acc[i][x]));
        }
    }
}

// Scores to probabilities, m and l updated; the factor for what came before goes to `fade`.
// Keys at or beyond visible - first are masked when `masked`.
template <int NR>
inline void panel_softmax(float* s, int n, bool masked, float first, const float* visible, float* m,
                          float* l, V* fade) {
  constexpr int L = V::kLanes, W = NR * L;
  const V hidden = V::set(-std::numeric_limits<float>::infinity());
  for (int x = 0; x < NR; ++x) {
    float* sx = s + x * L;
    V top = V::load(m + x * L);
    if (masked) {
      const V limit = sub(V::load(visible + x * L), V::set(first));
      for (int j = 0; j < n; ++j) {
        float* at = sx + j * W;
        store(at, select_less(V::set(static_cast<float>(j)), limit, V::load(at), hidden));
      }
    }
    for (int j = 0; j < n; ++j) top = max(top, V::load(sx + j * W));
    fade[x] = exp(sub(V::load(m + x * L), top));
    V total = V::set(0.0f);
    for (int j = 0; j < n; ++j) {
      const V p = exp(sub(V::load(sx + j * W), top));
      store(sx + j * W, p);
      total = add(total, p);
    }
    store(m + x * L, top);
    store(l + x * L, add(mul(V::load(l + x * L), fade[x]), total));
  }
}

// o[c] = o[c] * fade + sum over keys [0, n) of p * v[c].
template <int NR>
inline void panel_values(const float* v, const float* p, int n, int K, const V* fade, float* o) {
  constexpr int L = V::kLanes, W = NR * L, MR = NR == 1 ? 8 : 4;
  for (int c = 0; c < K; c += MR) {
    V acc[MR][NR];
    for (int i = 0; i < MR; ++i)
      for (int x = 0; x < NR; ++x) acc[i][x] = V::set(0.0f);
    for (int j = 0; j < n; ++j) {
      V pv[NR];
      for (int x = 0; x < NR; ++x) pv[x] = V::load(p + j * W + x * L);
      for (int i = 0; i < MR; ++i) {
        const V vv = V::set(v[j * K + c + i]);
        for (int x = 0; x < NR; ++x) acc[i][x] = fma(pv[x], vv, acc[i][x]);
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int x = 0; x < NR; ++x) {
        float* to = o + (c + i) * W + x * L;
        store(to, add(mul(V::load(to), fade[x]), acc[i][x]));
      }
  }
}

template <int NR>
inline void attend_panel(const AttentionBlock& b, int row, int n, bool masked, float first) {
  const int64_t at = static_cast<int64_t>(row) * b.K;
  V fade[NR];
  panel_scores<NR>(b.k, b.q + at, n, b.K, b.s);
  panel_softmax<NR>(b.s, n, masked, first, b.visible + row, b.m + row, b.l + row, fade);
  panel_values<NR>(b.v, b.s, n, b.K, fade, b.o + at);
}

// All rows of the block attend to the first n keys of a page that starts at key `first` of the
// sequence. `masked`: some row sees less than the whole page.
template <class KV>
inline void attend_page(const AttentionBlock& b, const KV* k, const KV* v, int n, bool masked,
                        int64_t first) {
  load_page(k, n, b.K, b.k);
  load_page(v, n, b.K, b.v);
  const int keys = round_up(n, kKeyStep);
  const float start = static_cast<float>(first);
  for (int row = 0; row < b.lanes; row += kPanel * V::kLanes) switch ((b.lanes - row) / V::kLanes) {
      case 1: attend_panel<1>(b, row, keys, masked, start); break;
      case 2: attend_panel<2>(b, row, keys, masked, start); break;
      default: attend_panel<3>(b, row, keys, masked, start);
    }
}

// out[c] = o[c] * v_scale / l of one row.
template <class T>
inline void write_result(const AttentionBlock& b, int row, float v_scale, T* out) {
  const RowPlace at = row_place(b, row);
  const float scale = v_scale / b.l[row];
  for (int c = 0; c < b.K; ++c)
    from_float(b.o[at.base + static_cast<int64_t>(c) * at.step] * scale, out[c]);
}

}  // namespace ei::EI_ISA
