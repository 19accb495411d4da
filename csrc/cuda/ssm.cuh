// The Mamba-2 recurrence (ssm.h) for rows of one head's state, shared by the ops that have it.
#pragma once
#include <type_traits>

#include "cuda/rows.cuh"
#include "host/ssm.h"

namespace ei::cuda {

constexpr int kSsmRows = 4;        // state rows of one warp
constexpr int kSsmMaxState = 256;  // largest N

EI_DEVICE float softplus(float z) { return z > 20.0f ? z : log1pf(expf(z)); }

// dt' of one head at one token.
EI_DEVICE float time_step(const SsmArgs& a, int64_t token, int head) {
  return softplus(value_at(a.dt, token * a.dt.stride[0] + head) + a.dt_bias.ptr<float>()[head]);
}

// dt' and how much of the state it leaves.
struct TimeStep {
  float dt, decay;
};
EI_DEVICE TimeStep decaying_step(const SsmArgs& a, int64_t token, int head) {
  const float dt = time_step(a, token, head);
  return {dt, expf(-expf(a.A_log.ptr<float>()[head]) * dt)};
}

// What a value of the state becomes when it is kept as float16 (small_floats.h).
EI_DEVICE float rounded_state(float h, uint32_t counter) {
  return float_from_half(round_stochastic(h, random_word(counter)).bits);
}
// Of one head after `read` tokens of its sequence.
EI_DEVICE uint32_t state_key(const SsmArgs& a, int64_t read, int head) {
  return rounding_key(static_cast<uint32_t>(a.seed), static_cast<uint32_t>(read),
                      static_cast<uint32_t>(head));
}
// Tokens that sequence s read before.
EI_DEVICE int64_t read_before(const SsmArgs& a, int64_t s) {
  return a.context ? a.context.ptr<int32_t>()[s] : 0;
}

// kSsmRows rows of state in the registers of a warp: lane l holds columns 4 l + 128 j of each.
// kSteps covers N.
template <int kSteps>
struct StateRows {
  float h[kSsmRows][kSteps][4];
  int N, lane;

  EI_DEVICE StateRows(int N_) : N(N_), lane(threadIdx.x % kWarp) {}
  EI_DEVICE int column(int step) const { return 4 * lane + 128 * step; }

  template <class State>
  EI_DEVICE void read(const State* state) {
    for (int p = 0; p < kSsmRows; ++p)
      for (int j = 0; j < kSteps; ++j)
        if (column(j) < N) load_floats(state + p * N + column(j), h[p][j]);
  }
  template <class State>
  EI_DEVICE void write(State* state) const {
    for (int p = 0; p < kSsmRows; ++p)
      for (int j = 0; j < kSteps; ++j)
        if (column(j) < N) store(state + p * N + column(j), h[p][j]);
  }

  // The values become what float16 holds; `key`: of the head and position, plus the first row * N.
  EI_DEVICE void round(uint32_t key) {
    for (int p = 0; p < kSsmRows; ++p)
      for (int j = 0; j < kSteps; ++j)
        for (int i = 0; column(j) < N && i < 4; ++i)
          h[p][j][i] = rounded_state(h[p][j][i], key + p * N + column(j) + i);
  }

  // h = decay h + (dt x) B^T, y = h C: one token. y[p] is the same in all lanes.
  template <class T>
  EI_DEVICE void step(const T* B, const T* C, TimeStep t, const float (&x)[kSsmRows],
                      float (&y)[kSsmRows]) {
    for (int p = 0; p < kSsmRows; ++p) y[p] = 0.0f;
    for (int j = 0; j < kSteps; ++j) {
      if (column(j) >= N) continue;
      float b[4], c[4];
      load_floats(B + column(j), b);
      load_floats(C + column(j), c);
      for (int p = 0; p < kSsmRows; ++p)
        for (int i = 0; i < 4; ++i) {
          h[p][j][i] = fused(t.decay, h[p][j][i], (t.dt * x[p]) * b[i]);
          y[p] = fused(h[p][j][i], c[i], y[p]);
        }
    }
    for (int p = 0; p < kSsmRows; ++p) y[p] = sum_lanes(y[p]);
  }
};

// Row `first` of one head's state in a slot.
template <class State>
EI_DEVICE State* state_row(const SsmArgs& a, int64_t slot, int head, int first) {
  const int64_t P = a.state.shape[2], N = a.state.shape[3];
  return a.state.ptr<State>() + slot * a.state.stride[0] + (head * P + first) * N;
}

// One token: y = h C + D x of a warp's rows, to y[0, kSsmRows).
template <class T, class In, int kSteps>
EI_DEVICE void step_rows(StateRows<kSteps>& rows, const SsmArgs& a, int64_t token, int head,
                         const In* B, const In* C, const float (&x)[kSsmRows], T* y) {
  float sums[kSsmRows];
  rows.step(B, C, decaying_step(a, token, head), x, sums);
  const float skip = a.D.ptr<float>()[head];
  for (int p = 0; p < kSsmRows; ++p)  // one lane per row writes it
    if (rows.lane == p) from_float(fused(skip, x[p], sums[p]), y[p]);
}

// Tokens [begin, end) of sequence s, one head, state rows [first, first + kSsmRows), by one warp.
template <class T, class State, int kSteps>
EI_DEVICE void run_rows(const SsmArgs& a, int64_t s, int64_t begin, int64_t end, int head,
                        int first) {
  const int64_t slot = a.slots.ptr<int32_t>()[s];
  const int P = static_cast<int>(a.state.shape[2]), N = static_cast<int>(a.state.shape[3]);
  const int group = head % a.groups;
  State* state = state_row<State>(a, slot, head, first);
  StateRows<kSteps> rows(N);
  rows.read(state);
  for (int64_t t = begin; t < end; ++t) {
    const T* in = row<T>(a.x, t) + head * P + first;
    float x[kSsmRows];
    for (int p = 0; p < kSsmRows; ++p) x[p] = to_float(in[p]);
    step_rows(rows, a, t, head, row<T>(a.B, t) + group * N, row<T>(a.C, t) + group * N, x,
              row<T>(a.y, t) + head * P + first);
    if constexpr (sizeof(State) == 2) {
      const int64_t read = read_before(a, s) + t + 1 - begin;
      if (read % kSsmStored == 0 || t + 1 == end)
        rows.round(state_key(a, read, head) + static_cast<uint32_t>(first * N));
    }
  }
  rows.write(state);
}

// f(x, state, steps): values of the dtypes of x and state, and the steps of StateRows that cover
// the state.
template <class F>
void by_kind(const SsmArgs& a, const F& f) {
  const auto by_steps = [&](auto x, auto state) {
    if (a.state.shape[3] > 128)
      f(x, state, std::integral_constant<int, 2>());
    else
      f(x, state, std::integral_constant<int, 1>());
  };
  const auto by_state = [&](auto x) { a.stochastic() ? by_steps(x, f16()) : by_steps(x, float()); };
  a.x.dtype == DType::f32 ? by_state(float()) : by_state(bf16());
}

}  // namespace ei::cuda
