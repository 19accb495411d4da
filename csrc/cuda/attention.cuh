// Attention of 16 query rows to a run of keys by one warp, on tensor cores; shared by decode and
// prefill.
//
// Scores are kept in the base-2 logarithm: exp2((s - m) scale log2(e)). A row's running maximum m,
// sum l and output o are joined with each run of keys in ascending order, so a row's bits depend on
// its own values and on where runs begin, not on its neighbours; a run that a row does not see at
// all leaves its bits as they are. Source: Milakov and Gimelshein, "Online normalizer calculation
// for softmax"; Dao, "FlashAttention-2" (probabilities stay in registers as the next product's
// operand).
#pragma once
#include "cuda/rows.cuh"

namespace ei::cuda {

constexpr int kPage = 64;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNothingSeen = -INFINITY;

// What exp2 subtracts: the maximum, or 0 where nothing was seen (then all terms are 0, not NaN).
EI_DEVICE float finite_maximum(float m) { return m == kNothingSeen ? 0.0f : m; }

// Where chunk `chunk` (16 bytes) of row `row` is in a block of rows of kHead bfloat16.
template <int kHead>
EI_DEVICE int chunk_place(int row, int chunk) {
  return row * kHead * 2 + (chunk ^ (row & 7)) * 16;
}

// Copies 16 bytes of row `row` of a page to shared memory as they are, zeros where !there. Rows of
// bfloat16 land where the matrix instructions take them from; E4M3 codes lie side by side until
// widen().
template <int kHead, class KV>
EI_DEVICE void stage_chunk(char* to, int row, int chunk, const KV* page, bool there) {
  const int at = sizeof(KV) == 1 ? row * kHead + chunk * 16 : chunk_place<kHead>(row, chunk);
  copy_async<16>(to + at, page, there);
}

// `rows` staged rows of K codes as bfloat16, by the threads `me` of `threads`.
template <int kHead>
EI_DEVICE void widen(const char* codes, char* to, int rows, int K, int me, int threads) {
  const int chunks = K / 8;
  for (int i = me; i < rows * chunks; i += threads) {
    const int r = i / chunks, chunk = i % chunks;
    const auto* from = reinterpret_cast<const uint32_t*>(codes + r * kHead + chunk * 8);
    Bytes16 wide;
    for (int j = 0; j < 4; ++j) wide.word[j] = bf16_from_e4m3(from[j / 2] >> j % 2 * 16 & 0xffffu);
    store16(to + chunk_place<kHead>(r, chunk), wide);
  }
}

// kHead: room for the head size, 64 or 128; `head` is the size itself, a multiple of 16.
template <int kHead>
struct WarpRows {
  uint32_t q[kHead / 16][4];
  float o[kHead / 8][4];
  float m[2], l[2];  // of rows g and g + 8, g = lane / 4
  int lane, head;

  EI_DEVICE explicit WarpRows(int head_) : lane(threadIdx.x % kWarp), head(head_) {
    EI_UNROLL
    for (int c = 0; c < kHead / 8; ++c)
      for (int j = 0; j < 4; ++j) o[c][j] = 0.0f;
    m[0] = m[1] = kNothingSeen;
    l[0] = l[1] = 0.0f;
  }

  // Queries of rows g and g + 8; null rows are zero.
  EI_DEVICE void set_queries(const bf16* low, const bf16* high) {
    const bf16* rows[2] = {low, high};
    EI_UNROLL
    for (int k = 0; k < kHead / 16; ++k) EI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const bf16* from = rows[j % 2];
      const int column = k * 16 + j / 2 * 8 + lane % 4 * 2;
      q[k][j] = from && column < head ? *reinterpret_cast<const uint32_t*>(from + column) : 0;
    }
  }

  // All rows attend to kKeys keys whose K and V rows are in shared memory; row g + 8 i sees the
  // first visible[i] of them. Values of keys that nobody may see must be finite.
  template <int kKeys>
  EI_DEVICE void attend(const char* keys, const char* values, float scale_log2,
                        const int (&visible)[2]) {
    float s[kKeys / 8][4] = {};
    EI_UNROLL
    for (int k = 0; k < kHead / 16; ++k) {
      if (k * 16 >= head) break;
      EI_UNROLL
      for (int n = 0; n < kKeys / 8; n += 2) {
        uint32_t b[4];
        const int key = n * 8 + lane / 16 * 8 + lane % 8;
        load_matrices(b, keys + chunk_place<kHead>(key, k * 2 + lane / 8 % 2));
        multiply_add(s[n], q[k], b[0], b[1]);
        multiply_add(s[n + 1], q[k], b[2], b[3]);
      }
    }
    soften<kKeys>(s, scale_log2, visible);
    EI_UNROLL
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t p[4] = {
          pack_bf16(s[2 * k][0], s[2 * k][1]), pack_bf16(s[2 * k][2], s[2 * k][3]),
          pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]), pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3])};
      EI_UNROLL
      for (int c = 0; c < kHead / 16; ++c) {
        if (c * 16 >= head) break;
        uint32_t b[4];
        const int key = k * 16 + lane / 8 % 2 * 8 + lane % 8;
        load_matrices<true>(b, values + chunk_place<kHead>(key, c * 2 + lane / 16));
        multiply_add(o[2 * c], p, b[0], b[1]);
        multiply_add(o[2 * c + 1], p, b[2], b[3]);
      }
    }
  }

 private:
  // Scores to probabilities; m and l take them in, o fades.
  template <int kKeys>
  EI_DEVICE void soften(float (&s)[kKeys / 8][4], float scale_log2, const int (&visible)[2]) {
    EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
      EI_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) EI_UNROLL
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        const int key = n * 8 + lane % 4 * 2 + j % 2;
        s[n][j] = key < visible[i] ? s[n][j] * scale_log2 : kNothingSeen;
        top = fmaxf(top, s[n][j]);
      }
      top = max_lanes<4>(top);  // the four lanes of a row
      const float base = finite_maximum(top), fade = exp2_fast(m[i] - base);
      float total = 0.0f;
      EI_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) EI_UNROLL
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        s[n][j] = exp2_fast(s[n][j] - base);
        total += s[n][j];
      }
      m[i] = top;
      l[i] = fused(l[i], fade, sum_lanes<4>(total));
      EI_UNROLL
      for (int c = 0; c < kHead / 8; ++c) o[c][2 * i] *= fade, o[c][2 * i + 1] *= fade;
    }
  }
};

// ---- float32, and heads beyond 128: one row by one warp, in ordinary arithmetic

constexpr int kMostHead = 256;

// A warp's own shared memory.
struct PlainRoom {
  float q[kMostHead], p[kWarp];
};

// A lane scores one of 32 keys, then gathers every 32nd channel of the output.
struct PlainRow {
  static constexpr int kSteps = kMostHead / kWarp;
  float o[kSteps], m = kNothingSeen, l = 0.0f;
  PlainRoom& room;
  int lane, head;

  // `q` null: a row of zeros.
  template <class T>
  EI_DEVICE PlainRow(PlainRoom& room_, const T* q, int head_, float scale)
      : room(room_), lane(threadIdx.x % kWarp), head(head_) {
    EI_UNROLL
    for (int k = 0; k < kSteps; ++k) o[k] = 0.0f;
    for (int c = lane; c < head; c += kWarp) room.q[c] = q ? to_float(q[c]) * scale : 0.0f;
    sync_warp();
  }

  // Attends to the keys [first, end), at most 32; at(j) is where key or value j is in the pages.
  template <class KV, class At>
  EI_DEVICE void attend(const KV* keys, const KV* values, int first, int end, const At& at) {
    float score = kNothingSeen;
    if (first + lane < end) {
      const KV* key = keys + at(first + lane);
      float part[4] = {};  // short sums are the more exact ones
      for (int c = 0; c < head; c += 4) {
        float k[4];
        load_floats(key + c, k);
        EI_UNROLL
        for (int i = 0; i < 4; ++i) part[i] = fused(room.q[c + i], k[i], part[i]);
      }
      score = (part[0] + part[1]) + (part[2] + part[3]);
    }
    const float top = max_lanes(fmaxf(m, score));
    const float base = finite_maximum(top), fade = expf(m - base), p = expf(score - base);
    room.p[lane] = p;
    l = fused(l, fade, sum_lanes(p));
    m = top;
    EI_UNROLL
    for (int k = 0; k < kSteps; ++k) o[k] *= fade;
    sync_warp();
    for (int j = first; j < end; ++j) {
      const KV* value = values + at(j);
      const float weight = room.p[j - first];
      EI_UNROLL
      for (int k = 0; k < kSteps; ++k)
        if (lane + k * kWarp < head) o[k] = fused(weight, to_float(value[lane + k * kWarp]), o[k]);
    }
    sync_warp();  // before p is written again
  }
};

}  // namespace ei::cuda
