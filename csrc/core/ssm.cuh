// The Mamba-2 recurrence (ssm.h) for rows of one head's state, shared by the ops that have it.
#pragma once
#include <type_traits>

#include "rows.cuh"
#include "ssm.h"

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

// kSsmRows rows of state in the registers of a warp: lane l holds columns 4 l + 128 j of each.
// kSteps covers N.
template <int kSteps>
struct StateRows {
  float h[kSsmRows][kSteps][4];
  int N, lane;

  EI_DEVICE StateRows(int N_) : N(N_), lane(threadIdx.x % kWarp) {}
  EI_DEVICE int column(int step) const { return 4 * lane + 128 * step; }

  EI_DEVICE void read(const float* state) {
    for (int p = 0; p < kSsmRows; ++p)
      for (int j = 0; j < kSteps; ++j)
        if (column(j) < N) load(state + p * N + column(j), h[p][j]);
  }
  EI_DEVICE void write(float* state) const {
    for (int p = 0; p < kSsmRows; ++p)
      for (int j = 0; j < kSteps; ++j)
        if (column(j) < N) store(state + p * N + column(j), h[p][j]);
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
          h[p][j][i] = t.decay * h[p][j][i] + (t.dt * x[p]) * b[i];
          y[p] += h[p][j][i] * c[i];
        }
    }
    for (int p = 0; p < kSsmRows; ++p) y[p] = sum_lanes(y[p]);
  }
};

// Tokens [begin, end) of one head, state rows [first, first + kSsmRows), by one warp.
template <class T, int kSteps>
EI_DEVICE void run_rows(const SsmArgs& a, int64_t begin, int64_t end, int64_t slot, int head,
                        int first) {
  const int P = static_cast<int>(a.state.shape[2]), N = static_cast<int>(a.state.shape[3]);
  const int group = head % a.groups;
  const float skip = a.D.ptr<float>()[head];
  float* state = a.state.ptr<float>() + slot * a.state.stride[0] +
                 (static_cast<int64_t>(head) * P + first) * N;
  StateRows<kSteps> rows(N);
  rows.read(state);
  for (int64_t t = begin; t < end; ++t) {
    const T* in = row<T>(a.x, t) + head * P + first;
    float x[kSsmRows], y[kSsmRows];
    for (int p = 0; p < kSsmRows; ++p) x[p] = to_float(in[p]);
    rows.step(row<T>(a.B, t) + group * N, row<T>(a.C, t) + group * N, decaying_step(a, t, head), x,
              y);
    // One lane per row writes it.
    for (int p = 0; p < kSsmRows; ++p)
      if (rows.lane == p) from_float(y[p] + skip * x[p], row<T>(a.y, t)[head * P + first + p]);
  }
  rows.write(state);
}

// f(x, steps): a value of x's dtype, and the steps of StateRows that cover the state.
template <class F>
void by_kind(const SsmArgs& a, const F& f) {
  const auto by_steps = [&](auto x) {
    if (a.state.shape[3] > 128)
      f(x, std::integral_constant<int, 2>());
    else
      f(x, std::integral_constant<int, 1>());
  };
  a.x.dtype == DType::f32 ? by_steps(float()) : by_steps(bf16());
}

}  // namespace ei::cuda
