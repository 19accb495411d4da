// The Mamba-2 recurrence (ssm.h) for one head of one sequence. ssm_scan and ssm_step compile this
// same code, so a prefill cut anywhere, or run token by token, gives equal bits.
#pragma once
#include "cpu/vec.h"
#include "host/index.h"
#include "host/ssm.h"

namespace ei::EI_ISA {

// State rows that stay in the first-level cache while tokens pass over them, rows that share the
// loads of B and C, tokens whose dt is computed at once (a float16 state is rounded after them),
// and the largest N.
constexpr int kSsmRows = 32, kSsmTile = 4, kSsmTokens = kSsmStored, kSsmMaxState = 256;

// One row of B or C as floats: itself, or converted into `room`.
inline const float* as_floats(const float* row, int, float*) { return row; }
inline const float* as_floats(const bf16* row, int n, float* room) {
  for (int i = 0; i < n; i += V::kLanes) store(room + i, V::load(row + i));
  return room;
}

// h = decay * h + drive[p] * B for kSsmTile rows of state, and y[p] = h . C: lanes over N
// ascending, then pairwise.
inline void ssm_tile(float* h, const float* B, const float* C, int N, float decay,
                     const float* drive, float* y) {
  const V a = V::set(decay);
  V u[kSsmTile], total[kSsmTile];
  for (int p = 0; p < kSsmTile; ++p) {
    u[p] = V::set(drive[p]);
    total[p] = V::set(0.0f);
  }
  for (int n = 0; n < N; n += V::kLanes) {
    const V b = V::load(B + n), c = V::load(C + n);
    for (int p = 0; p < kSsmTile; ++p) {
      const V next = fma(u[p], b, mul(a, V::load(h + p * N + n)));
      store(h + p * N + n, next);
      total[p] = fma(next, c, total[p]);
    }
  }
  for (int p = 0; p < kSsmTile; ++p) y[p] = sum(total[p]);
}

// Tokens [token, token + tokens) of one head; h: state rows [row, row + rows), rows <= kSsmRows.
template <class T>
void ssm_rows(const SsmArgs& a, int64_t head, int64_t token, int tokens, float* h, int row,
              int rows, const float* dt, const float* decay) {
  const int P = static_cast<int>(a.state.shape[2]), N = static_cast<int>(a.state.shape[3]);
  const int64_t group = head % a.groups, column = head * P + row;
  const float skip = a.D.ptr<float>()[head];
  alignas(64) float room[2][kSsmMaxState], drive[kSsmRows], y[kSsmRows];
  for (int t = 0; t < tokens; ++t) {
    const int64_t at = token + t;
    const float* B = as_floats(a.B.ptr<T>() + at * a.B.stride[0] + group * N, N, room[0]);
    const float* C = as_floats(a.C.ptr<T>() + at * a.C.stride[0] + group * N, N, room[1]);
    const T* x = a.x.ptr<T>() + at * a.x.stride[0] + column;
    for (int p = 0; p < rows; ++p) drive[p] = dt[t] * to_float(x[p]);
    for (int p = 0; p < rows; p += kSsmTile)
      ssm_tile(h + p * N, B, C, N, decay[t], drive + p, y + p);
    T* out = a.y.ptr<T>() + at * a.y.stride[0] + column;
    for (int p = 0; p < rows; p += V::kLanes)
      store(out + p, fma(V::set(skip), V::load(x + p), V::load(y + p)));
  }
}

// Rows of the state as the recurrence wants them: the pool's own where it is float; otherwise a
// copy, which `close` rounds back.
inline float* open_rows(float* state, int64_t, float*) { return state; }
inline float* open_rows(const f16* state, int64_t n, float* room) {
  for (int64_t i = 0; i < n; i += V::kLanes) store(room + i, V::load(state + i));
  return room;
}
inline void close_rows(const float*, int64_t, float*, uint32_t) {}
inline void close_rows(const float* room, int64_t n, f16* state, uint32_t key) {
  for (int64_t i = 0; i < n; i += V::kLanes)
    store_stochastic(state + i, V::load(room + i), key + static_cast<uint32_t>(i));
}

// All tokens [begin, end) of one head of one sequence that has read `before` tokens.
template <class T, class TimeStep, class State>
void ssm_head(const SsmArgs& a, int64_t head, int64_t begin, int64_t end, int64_t slot,
              int64_t before) {
  const int P = static_cast<int>(a.state.shape[2]), N = static_cast<int>(a.state.shape[3]);
  const float rate = -std::exp(a.A_log.ptr<float>()[head]);
  const float bias = a.dt_bias.ptr<float>()[head];
  State* state = a.state.ptr<State>() + slot * a.state.stride[0] + head * P * N;
  float dt[kSsmTokens], decay[kSsmTokens];
  alignas(64) float room[sizeof(State) == 2 ? kSsmRows * kSsmMaxState : 1];
  int tokens;
  for (int64_t token = begin; token < end; token += tokens, before += tokens) {
    tokens = static_cast<int>(std::min<int64_t>(kSsmTokens - before % kSsmTokens, end - token));
    const TimeStep* raw = a.dt.ptr<TimeStep>() + token * a.dt.stride[0] + head;
    for (int t = 0; t < tokens; ++t) {
      const float z = to_float(raw[t * a.dt.stride[0]]) + bias;
      dt[t] = z > 20.0f ? z : std::log1p(std::exp(z));
      decay[t] = std::exp(rate * dt[t]);
    }
    const uint32_t key =
        rounding_key(static_cast<uint32_t>(a.seed), static_cast<uint32_t>(before + tokens),
                     static_cast<uint32_t>(head));
    for (int row = 0; row < P; row += kSsmRows) {
      const int rows = std::min(kSsmRows, P - row);
      float* h = open_rows(state + row * N, rows * N, room);
      ssm_rows<T>(a, head, token, tokens, h, row, rows, dt, decay);
      close_rows(h, rows * N, state + row * N, key + static_cast<uint32_t>(row * N));
    }
  }
}

// The slot of sequence s and how many tokens it has read; slot -1 for padding and after a report.
struct SsmPlace {
  int32_t slot, before;
};
inline SsmPlace ssm_place(Pool& pool, const char* op, const SsmArgs& a, int64_t s) {
  const int32_t slot = read_once(a.slots, s), before = a.context ? read_once(a.context, s) : 0;
  if (!inside(pool, op, "slots", slot, -1, a.state.shape[0] - 1, "sequence", s) ||
      !inside(pool, op, "context", before, 0, INT32_MAX, "sequence", s))
    return {-1, 0};
  return {slot, before};
}

template <class T, class TimeStep, class State>
void ssm_all(const char* op, const SsmArgs& a, Pool& pool) {
  const int64_t S = a.slots.shape[0], H = a.state.shape[1];
  const ActiveSizes heads{op,        a.seq_width, "seq_width", a.h_sizes,
                          "h_sizes", H,           a.groups,    "sequence"};
  pool.run(S * H, [&](int64_t part, int) {
    const int64_t s = part / H, head = part % H;
    const SsmPlace place = ssm_place(pool, op, a, s);
    if (place.slot < 0 || head >= heads.at(pool, s)) return;
    const Span span =
        a.cu_seqlens ? span_of(pool, op, a.cu_seqlens, s, a.x.shape[0]) : Span{s, s + 1};
    ssm_head<T, TimeStep, State>(a, head, span.begin, span.end, place.slot, place.before);
  });
}

// f(x, dt, state): values of their dtypes.
template <class F>
void ssm_by_kind(const SsmArgs& a, const F& f) {
  const auto by_state = [&](auto x, auto dt) {
    a.stochastic() ? f(x, dt, f16()) : f(x, dt, float());
  };
  if (a.x.dtype == DType::f32) return by_state(float(), float());
  a.dt.dtype == DType::f32 ? by_state(bf16(), float()) : by_state(bf16(), bf16());
}

inline void ssm_run(const char* op, const SsmArgs& a, Pool& pool) {
  ssm_by_kind(a, [&](auto x, auto dt, auto state) {
    ssm_all<decltype(x), decltype(dt), decltype(state)>(op, a, pool);
  });
}

}  // namespace ei::EI_ISA
