// One chunk of 64 tokens of ssm_scan on tensor cores, for one head by four warps: what its kernels
// share. ssm_scan.cu says what is computed and where it lies.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/ssm.cuh"
#include "ssm_scan.h"

namespace ei::cuda {

constexpr int kScanThreads = 128;
constexpr int kChunk = 64, kMostP = 64, kMostN = 128;

struct ChunkInputs {
  char x[kChunk * kMostP * 2], B[kChunk * kMostN * 2], C[kChunk * kMostN * 2];
};
struct ChunkShared {
  ChunkInputs inputs[2];
  char h[kMostP * kMostN * 2];                  // [P][N], as the rows of an operand
  float dt[kChunk], high[kChunk], low[kChunk];  // c_t = high + low
};

struct Head {
  const SsmArgs& a;
  ChunkShared& shared;
  int head, group, P, N, begin, end;
  int shift;  // from a row of x to the number of the token in its sequence
  int warp, lane;

  EI_DEVICE Head(const SsmArgs& args, ChunkShared& room, int head_, int64_t s)
      : a(args), shared(room), head(head_) {
    group = head % a.groups;
    P = static_cast<int>(a.state.shape[2]);
    N = static_cast<int>(a.state.shape[3]);
    begin = a.cu_seqlens.ptr<int32_t>()[s];
    end = a.cu_seqlens.ptr<int32_t>()[s + 1];
    shift = static_cast<int>(read_before(a, s)) - begin;
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
  }

  // From now on of the tokens [first, last) of its sequence alone.
  EI_DEVICE void narrow(int first, int last) {
    begin = first;
    end = last;
  }

  // Where the chunk that begins at `first` ends: at a multiple of 64 of the whole sequence, where a
  // float16 state is rounded, or at the last token.
  EI_DEVICE int stop(int first) const {
    return min(end, first + kChunk - (first + shift) % kChunk);
  }

  // Copies the chunk that begins at `first`; what is missing to 64 tokens becomes zero. C only
  // where outputs are wanted.
  template <bool kOutputs = true>
  EI_DEVICE void stage(int first, ChunkInputs& to) const {
    const int x_chunks = P / 8, n_chunks = N / 8, last = stop(first);
    for (int i = threadIdx.x; i < kChunk * x_chunks; i += kScanThreads) {
      const int t = i / x_chunks, chunk = i % x_chunks;
      const bool there = first + t < last;
      copy_async<16>(to.x + chunk_place<kMostP>(t, chunk),
                     row<bf16>(a.x, there ? first + t : first) + head * P + chunk * 8, there);
    }
    for (int i = threadIdx.x; i < kChunk * n_chunks; i += kScanThreads) {
      const int t = i / n_chunks, chunk = i % n_chunks, at = chunk_place<kMostN>(t, chunk);
      const bool there = first + t < last;
      const int64_t token = there ? first + t : first;
      copy_async<16>(to.B + at, row<bf16>(a.B, token) + group * N + chunk * 8, there);
      if constexpr (kOutputs)
        copy_async<16>(to.C + at, row<bf16>(a.C, token) + group * N + chunk * 8, there);
    }
  }

  // dt and c of the chunk, two tokens per lane of the first warp. A token beyond the end has dt =
  // 0: it neither fades the state nor adds to it.
  EI_DEVICE void time_steps(int first) const {
    const float rate = -expf(a.A_log.ptr<float>()[head]);
    const int last = stop(first);
    float dt[2];
    double sum[2] = {0.0, 0.0};
    EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int t = first + 2 * lane + i;
      dt[i] = 0.0f;
      if (t < last) dt[i] = time_step(a, t, head);
      sum[i] = (i ? sum[0] : 0.0) + static_cast<double>(rate * dt[i]);
    }
    double before = sum[1];  // of the lanes before this one
    EI_UNROLL
    for (int step = 1; step < kWarp; step *= 2) {
      const double other = shuffle(before, lane - step);
      if (lane >= step) before += other;
    }
    before -= sum[1];
    EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      const double c = before + sum[i];
      shared.dt[2 * lane + i] = dt[i];
      shared.high[2 * lane + i] = static_cast<float>(c);
      shared.low[2 * lane + i] = static_cast<float>(c - static_cast<float>(c));
    }
  }
};

// The 16 rows of state of one warp: h[n] holds columns 8 n + c, c + 1 of rows g and g + 8.
struct WarpState {
  float h[kMostN / 8][4];

  template <class State>
  EI_DEVICE void read(const Head& b, const State* state) {
    EI_UNROLL
    for (int n = 0; n < kMostN / 8; ++n) EI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int p = b.warp * 16 + b.lane / 4 + j / 2 * 8, column = n * 8 + b.lane % 4 * 2 + j % 2;
      h[n][j] = p < b.P && column < b.N ? to_float(state[p * b.N + column]) : 0.0f;
    }
  }
  EI_DEVICE void write(const Head& b, float* state) const {
    each(b, [&](int at, float h) { state[at] = h; });
  }
  // Values that were rounded before: none changes.
  EI_DEVICE void write(const Head& b, f16* state) const {
    each(b, [&](int at, float h) { state[at] = round_stochastic(h, 0); });
  }
  // Rounded stochastically; `key`: of the head and position.
  EI_DEVICE void write(const Head& b, f16* state, uint32_t key) const {
    each(b, [&](int at, float h) { state[at] = round_stochastic(h, random_word(key + at)); });
  }
  EI_DEVICE void write(const Head& b, float* state, uint32_t key) const {
    each(b, [&](int at, float h) { state[at] = rounded_state(h, key + at); });
  }
  // Rounded, where all warps read it.
  EI_DEVICE void share(const Head& b) const {
    EI_UNROLL
    for (int n = 0; n < kMostN / 8; ++n) EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int p = b.warp * 16 + b.lane / 4 + i * 8;
      if (p < b.P && n * 8 < b.N)
        *reinterpret_cast<uint32_t*>(b.shared.h + chunk_place<kMostN>(p, n) + b.lane % 4 * 4) =
            pack_bf16(h[n][2 * i], h[n][2 * i + 1]);
    }
  }

  // h' of a chunk.
  EI_DEVICE void update(const Head& b, const ChunkInputs& in) {
    const float high = b.shared.high[kChunk - 1], low = b.shared.low[kChunk - 1];
    const float fade = expf(high + low);
    EI_UNROLL
    for (int n = 0; n < kMostN / 8; ++n)
      for (int j = 0; j < 4; ++j) h[n][j] *= fade;
    EI_UNROLL_BY(1)  // side by side, the steps would need more registers than there are
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t x[4], terms[3][4];
      const int x_token = k * 16 + b.lane / 16 * 8 + b.lane % 8;
      load_matrices<true>(x, in.x + chunk_place<kMostP>(x_token, b.warp * 2 + b.lane / 8 % 2));
      float weight[4];  // of tokens c, c + 1, c + 8, c + 9
      EI_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int t = k * 16 + i / 2 * 8 + b.lane % 4 * 2 + i % 2;
        weight[i] = expf((high - b.shared.high[t]) + (low - b.shared.low[t])) * b.shared.dt[t];
      }
      EI_UNROLL
      for (int j = 0; j < 4; ++j) {
        float even = float_from_bits(x[j] << 16) * weight[j / 2 * 2];
        float odd = float_from_bits(x[j] & 0xffff0000u) * weight[j / 2 * 2 + 1];
        EI_UNROLL
        for (int i = 0; i < 3; ++i) {
          terms[i][j] = pack_bf16(even, odd);
          even -= float_from_bits(terms[i][j] << 16);
          odd -= float_from_bits(terms[i][j] & 0xffff0000u);
        }
      }
      EI_UNROLL
      for (int n = 0; n < kMostN / 16; ++n) {
        if (n * 16 >= b.N) break;
        uint32_t B[4];
        const int token = k * 16 + b.lane / 8 % 2 * 8 + b.lane % 8;
        load_matrices<true>(B, in.B + chunk_place<kMostN>(token, n * 2 + b.lane / 16));
        EI_UNROLL
        for (int i = 2; i >= 0; --i) {  // the smallest first
          multiply_add(h[2 * n], terms[i], B[0], B[1]);
          multiply_add(h[2 * n + 1], terms[i], B[2], B[3]);
        }
      }
    }
  }

 private:
  // f(place in the head's state, value) of every value that there is.
  template <class F>
  EI_DEVICE void each(const Head& b, const F& f) const {
    EI_UNROLL
    for (int n = 0; n < kMostN / 8; ++n) EI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int p = b.warp * 16 + b.lane / 4 + j / 2 * 8, column = n * 8 + b.lane % 4 * 2 + j % 2;
      if (p < b.P && column < b.N) f(p * b.N + column, h[n][j]);
    }
  }
};

// y of 16 tokens of the chunk by one warp: rows g and g + 8, columns of P as in WarpState.
struct WarpOutput {
  float y[kMostP / 8][4];

  // exp(c_i) C_i h.
  EI_DEVICE void from_state(const Head& b, const ChunkInputs& in) {
    EI_UNROLL
    for (int n = 0; n < kMostP / 8; ++n)
      for (int j = 0; j < 4; ++j) y[n][j] = 0.0f;
    EI_UNROLL
    for (int k = 0; k < kMostN / 16; ++k) {
      if (k * 16 >= b.N) break;
      uint32_t C[4];
      load_c(C, b, in, k);
      EI_UNROLL
      for (int n = 0; n < kMostP / 16; ++n) {
        if (n * 16 >= b.P) break;
        uint32_t h[4];
        const int p = n * 16 + b.lane / 16 * 8 + b.lane % 8;
        load_matrices(h, b.shared.h + chunk_place<kMostN>(p, k * 2 + b.lane / 8 % 2));
        multiply_add(y[2 * n], C, h[0], h[1]);
        multiply_add(y[2 * n + 1], C, h[2], h[3]);
      }
    }
    EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float fade = expf(b.shared.high[token(b, i)]);
      EI_UNROLL
      for (int n = 0; n < kMostP / 8; ++n) y[n][2 * i] *= fade, y[n][2 * i + 1] *= fade;
    }
  }

  // The tokens of the chunk up to each row's own.
  EI_DEVICE void from_chunk(const Head& b, const ChunkInputs& in) {
    float s[kChunk / 8][4] = {};
    EI_UNROLL
    for (int k = 0; k < kMostN / 16; ++k) {
      if (k * 16 >= b.N) break;
      uint32_t C[4];
      load_c(C, b, in, k);
      EI_UNROLL
      for (int n = 0; n < kChunk / 16; ++n) {
        if (n > b.warp) break;
        uint32_t B[4];
        const int t = n * 16 + b.lane / 16 * 8 + b.lane % 8;
        load_matrices(B, in.B + chunk_place<kMostN>(t, k * 2 + b.lane / 8 % 2));
        multiply_add(s[2 * n], C, B[0], B[1]);
        multiply_add(s[2 * n + 1], C, B[2], B[3]);
      }
    }
    EI_UNROLL
    for (int n = 0; n < kChunk / 8; ++n) EI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = token(b, j / 2), t = n * 8 + b.lane % 4 * 2 + j % 2;
      s[n][j] =
          t <= i ? s[n][j] * expf(b.shared.high[i] - b.shared.high[t]) * b.shared.dt[t] : 0.0f;
    }
    EI_UNROLL
    for (int k = 0; k < kChunk / 16; ++k) {
      if (k > b.warp) break;
      const uint32_t S[4] = {
          pack_bf16(s[2 * k][0], s[2 * k][1]), pack_bf16(s[2 * k][2], s[2 * k][3]),
          pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]), pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3])};
      EI_UNROLL
      for (int n = 0; n < kMostP / 16; ++n) {
        if (n * 16 >= b.P) break;
        uint32_t x[4];
        const int t = k * 16 + b.lane / 8 % 2 * 8 + b.lane % 8;
        load_matrices<true>(x, in.x + chunk_place<kMostP>(t, n * 2 + b.lane / 16));
        multiply_add(y[2 * n], S, x[0], x[1]);
        multiply_add(y[2 * n + 1], S, x[2], x[3]);
      }
    }
  }

  // y + D x of the tokens that exist.
  EI_DEVICE void write(const Head& b, const ChunkInputs& in, int first) const {
    const float skip = b.a.D.ptr<float>()[b.head];
    EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int t = token(b, i);
      if (first + t >= b.stop(first)) continue;
      bf16* out = row<bf16>(b.a.y, first + t) + b.head * b.P;
      EI_UNROLL
      for (int n = 0; n < kMostP / 8; ++n) {
        if (n * 8 >= b.P) break;
        const uint32_t x =
            *reinterpret_cast<const uint32_t*>(in.x + chunk_place<kMostP>(t, n) + b.lane % 4 * 4);
        *reinterpret_cast<uint32_t*>(out + n * 8 + b.lane % 4 * 2) =
            pack_bf16(fused(skip, float_from_bits(x << 16), y[n][2 * i]),
                      fused(skip, float_from_bits(x & 0xffff0000u), y[n][2 * i + 1]));
      }
    }
  }

 private:
  static EI_DEVICE int token(const Head& b, int i) { return b.warp * 16 + b.lane / 4 + i * 8; }
  static EI_DEVICE void load_c(uint32_t (&C)[4], const Head& b, const ChunkInputs& in, int k) {
    load_matrices(C, in.C + chunk_place<kMostN>(b.warp * 16 + b.lane % 16, k * 2 + b.lane / 16));
  }
};

}  // namespace ei::cuda
