// Computes: ssm_scan (ssm_scan.h). bfloat16: in chunks of 64 tokens on tensor cores. With a_t the
//   logarithm of the decay, c_t its sum from the chunk's first token to t, and h the state before
//   it,
//     y_i = exp(c_i) C_i h + sum over j <= i of (C_i . B_j) exp(c_i - c_j) dt_j x_j + D x_i
//     h'  = exp(c_63) h + sum over j of (exp(c_63 - c_j) dt_j x_j) B_j^T
//   float32, and sizes beyond the limits: token by token (ssm.cuh), equal in bits to ssm_step.
// Layout: the state of a head stays in the registers of four warps (16 of P rows each, as
//   accumulators of the update) from the first to the last chunk; for C h it is rounded to bfloat16
//   in shared memory. The update itself keeps float: dt x is split into three bfloat16 terms, B is
//   exact. Sums c are made in double and kept as two floats, so that differences of large sums stay
//   exact.
// Work split: a block per (head, sequence), walking through its chunks; the next chunk arrives
//   (cp.async) while this one is computed. The scores C B^T of a warp end at its own diagonal.
// Order: chunks ascending; they end at multiples of 64 tokens of the whole sequence, where a
//   float16 state is rounded.
// Shared memory: 97 KiB: two chunks of x, B and C, and the rounded state.
// Limits: chunks take P up to 64, N up to 128 and x, B, C, y whose rows start at multiples of 16
//   bytes; in all, P and N are multiples of 16, N at most 256, the state starts at multiples of 16
//   bytes.
// Speed: not yet measured on a GPU. Floor: x, B, C, dt read and y written once. One long prompt
//   gives as many blocks as heads.
// Source: Dao and Gu, "Transformers are SSMs", section 6 (the chunked form).
#include "../../core/attention.cuh"
#include "../../core/launch.cuh"
#include "../../core/ssm.cuh"
#include "ssm_scan.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 128;

// ---- chunks on tensor cores

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
  int before;  // tokens that the sequence read before `begin`
  int warp, lane;

  EI_DEVICE Head(const SsmArgs& args, ChunkShared& room, int head_, int64_t s)
      : a(args), shared(room), head(head_) {
    group = head % a.groups;
    P = static_cast<int>(a.state.shape[2]);
    N = static_cast<int>(a.state.shape[3]);
    begin = a.cu_seqlens.ptr<int32_t>()[s];
    end = a.cu_seqlens.ptr<int32_t>()[s + 1];
    before = static_cast<int>(read_before(a, s));
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
  }

  // Where the chunk that begins at `first` ends: at a multiple of 64 of the whole sequence, where a
  // float16 state is rounded, or at the last token.
  EI_DEVICE int stop(int first) const {
    return min(end, first + kChunk - (before + first - begin) % kChunk);
  }

  // Copies the chunk that begins at `first`; what is missing to 64 tokens becomes zero.
  EI_DEVICE void stage(int first, ChunkInputs& to) const {
    const int x_chunks = P / 8, n_chunks = N / 8, last = stop(first);
    for (int i = threadIdx.x; i < kChunk * x_chunks; i += kThreads) {
      const int t = i / x_chunks, chunk = i % x_chunks;
      const bool there = first + t < last;
      copy16_async(to.x + chunk_place<kMostP>(t, chunk),
                   row<bf16>(a.x, there ? first + t : begin) + head * P + chunk * 8, there);
    }
    for (int i = threadIdx.x; i < kChunk * n_chunks; i += kThreads) {
      const int t = i / n_chunks, chunk = i % n_chunks, at = chunk_place<kMostN>(t, chunk);
      const bool there = first + t < last;
      const int64_t token = there ? first + t : begin;
      copy16_async(to.B + at, row<bf16>(a.B, token) + group * N + chunk * 8, there);
      copy16_async(to.C + at, row<bf16>(a.C, token) + group * N + chunk * 8, there);
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
  // Rounded stochastically; `key`: of the head and position.
  EI_DEVICE void write(const Head& b, f16* state, uint32_t key) const {
    each(b, [&](int at, float h) { state[at] = round_stochastic(h, random_word(key + at)); });
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
    EI_UNROLL
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
            pack_bf16(y[n][2 * i] + skip * float_from_bits(x << 16),
                      y[n][2 * i + 1] + skip * float_from_bits(x & 0xffff0000u));
      }
    }
  }

 private:
  static EI_DEVICE int token(const Head& b, int i) { return b.warp * 16 + b.lane / 4 + i * 8; }
  static EI_DEVICE void load_c(uint32_t (&C)[4], const Head& b, const ChunkInputs& in, int k) {
    load_matrices(C, in.C + chunk_place<kMostN>(b.warp * 16 + b.lane % 16, k * 2 + b.lane / 16));
  }
};

template <class State>
__global__ void __launch_bounds__(kThreads) scan_chunks(const __grid_constant__ SsmArgs a) {
  EI_DYNAMIC_SHARED(ChunkShared, shared);
  const int64_t s = blockIdx.y;
  const int32_t slot = a.slots.ptr<int32_t>()[s];
  const Head b(a, *shared, blockIdx.x, s);
  if (slot < 0 || b.begin == b.end) return;
  if (b.head >= active_size(a.seq_width, a.h_sizes, s, gridDim.x)) return;
  State* state =
      a.state.ptr<State>() + slot * a.state.stride[0] + static_cast<int64_t>(b.head) * b.P * b.N;
  WarpState h;
  h.read(b, state);
  b.stage(b.begin, shared->inputs[0]);
  commit_copies();
  int now = 0;
  for (int first = b.begin, next; first < b.end; first = next, now ^= 1) {
    next = b.stop(first);
    wait_copies<0>();
    __syncthreads();  // this chunk is there for all, and all have left the one before
    if (next < b.end) b.stage(next, shared->inputs[now ^ 1]);
    commit_copies();
    if (b.warp == 0) b.time_steps(first);
    h.share(b);
    __syncthreads();
    const ChunkInputs& in = shared->inputs[now];
    WarpOutput y;
    y.from_state(b, in);
    y.from_chunk(b, in);
    y.write(b, in, first);
    if (b.warp * 16 < b.P) h.update(b, in);
    if constexpr (sizeof(State) == 2) {  // through memory, rows after rows: no registers spill
      h.write(b, state, state_key(a, b.before + next - b.begin, b.head));
      sync_warp();
      h.read(b, state);
    }
  }
  if constexpr (sizeof(State) == 4) h.write(b, state);
}

// ---- token by token

constexpr int kRows = kThreads / kWarp * kSsmRows;

template <class T, class State, int kSteps>
__global__ void __launch_bounds__(kThreads) scan_tokens(const __grid_constant__ SsmArgs a) {
  const int head = blockIdx.y;
  const int64_t s = blockIdx.z;
  const int32_t slot = a.slots.ptr<int32_t>()[s];
  const int32_t* cu = a.cu_seqlens.ptr<int32_t>() + s;
  if (slot < 0 || head >= active_size(a.seq_width, a.h_sizes, s, gridDim.y)) return;
  const int first = blockIdx.x * kRows + threadIdx.x / kWarp * kSsmRows;
  run_rows<T, State, kSteps>(a, s, cu[0], cu[1], head, first);
}

void launch_ssm_scan(const SsmArgs& a, const CudaCall& call) {
  require_aligned("ssm_scan", "x", a.x);
  require_aligned("ssm_scan", "B", a.B);
  require_aligned("ssm_scan", "C", a.C);
  require_aligned("ssm_scan", "y", a.y);
  require_aligned("ssm_scan", "state", a.state);
  const unsigned H = static_cast<unsigned>(a.state.shape[1]);
  const unsigned S = static_cast<unsigned>(a.slots.shape[0]);
  const int64_t P = a.state.shape[2], N = a.state.shape[3];
  if (a.x.dtype == DType::bf16 && P <= kMostP && N <= kMostN)
    return launch(call, a.stochastic() ? scan_chunks<f16> : scan_chunks<float>, dim3(H, S),
                  kThreads, sizeof(ChunkShared), a);
  const dim3 grid(static_cast<unsigned>(P / kRows), H, S);
  by_kind(a, [&](auto x, auto state, auto steps) {
    launch(call, scan_tokens<decltype(x), decltype(state), steps()>, grid, kThreads, 0, a);
  });
}

const RegisterCuda<SsmArgs, launch_ssm_scan> registered("ssm_scan");

}  // namespace
}  // namespace ei::cuda
