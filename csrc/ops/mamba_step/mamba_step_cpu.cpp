// Computes: mamba_step (mamba_step.h), from the parts of causal_conv, ssm_step and gated_norm, and
//   so with their bits.
// Layout: rows and weights as those ops have them; a part's convolved channels and y lie in its
//   thread's scratch, in the columns they have in a row.
// Work split: parts are (sequence, run of groups): the heads of a group need its B and C and no
//   others, and its norm needs its heads and no others. Runs are as long as leaves every thread two
//   parts, since the heads of neighbouring groups are neighbours in memory.
// Scratch: a row of xbc, a row of y, and a group's gated channels as floats.
// Order: as in the three ops.
// Limits: P and N are multiples of 16, N at most 256.
// Speed: see the op table in the README (bench/ops.py).
#include "mamba_step.h"

#include "cpu/mamba.h"
#include "cpu/ssm_core.h"

namespace ei::EI_ISA {
namespace {

constexpr const char* kOp = "mamba_step";

// A row of a thread's own that every sequence finds at its own index.
Tensor scratch_row(const Tensor& like, void* data) {
  Tensor t = like;
  t.data = data;
  t.stride[0] = 0;
  return t;
}

// Groups [group, end) of one sequence.
struct Part {
  int64_t s, slot, before;      // before: tokens read
  int group, end, heads, kept;  // heads: of all groups, that are computed; kept: that `out` keeps
};

// f(n) for the heads n < heads of the part's groups, ascending.
template <class F>
void each_head(const Part& p, int G, int64_t heads, const F& f) {
  for (int first = 0; first < heads; first += G)
    for (int n = first + p.group; n < first + p.end; ++n)
      if (n < heads) f(n);
}

// Convolves the channels [first, first + n) of xbc into the row `to`.
template <class T, class W>
void convolve(const MambaStepArgs& a, const Part& p, T* to, int64_t first, int n) {
  conv_token(a.ssm.x.ptr<T>() + p.s * a.ssm.x.stride[0] + first,
             a.conv_weight.ptr<W>() + first * kTaps, a.conv_bias.ptr<W>() + first,
             a.conv_state.ptr<T>() + p.slot * a.conv_state.stride[0] + first * kHistory, to + first,
             n);
}

template <class T, class W>
void convolve_groups(const MambaStepArgs& a, const Part& p, T* to) {
  const int P = static_cast<int>(a.ssm.state.shape[2]), N = static_cast<int>(a.ssm.state.shape[3]);
  const int64_t x = a.ssm.x.shape[1], bc = a.ssm.B.shape[1];
  each_head(p, a.ssm.groups, p.heads, [&](int n) { convolve<T, W>(a, p, to, n * P, P); });
  convolve<T, W>(a, p, to, x + p.group * N, (p.end - p.group) * N);
  convolve<T, W>(a, p, to, x + bc + p.group * N, (p.end - p.group) * N);
}

template <class T, class TimeStep, class State>
void run_part(const MambaStepArgs& a, const Part& p, char* scratch) {
  const SsmArgs& m = a.ssm;
  const int P = static_cast<int>(m.state.shape[2]), G = m.groups;
  const int64_t channels = m.x.shape[1], bc = m.B.shape[1];
  T* mixed = reinterpret_cast<T*>(scratch);
  T* y = mixed + channels + 2 * bc;
  float* gated = reinterpret_cast<float*>(y + channels);
  if constexpr (sizeof(T) == 4)
    convolve_groups<T, float>(a, p, mixed);
  else
    a.conv_weight.dtype == DType::bf16 ? convolve_groups<T, bf16>(a, p, mixed)
                                       : convolve_groups<T, float>(a, p, mixed);
  SsmArgs own = m;
  own.x = scratch_row(m.x, mixed);
  own.B = scratch_row(m.B, mixed + channels);
  own.C = scratch_row(m.C, mixed + channels + bc);
  own.y = scratch_row(m.y, y);
  each_head(p, G, p.heads,
            [&](int n) { ssm_head<T, TimeStep, State>(own, n, p.s, p.s + 1, p.slot, p.before); });
  const T* z = a.z.ptr<T>() + p.s * a.z.stride[0];
  T* out = m.y.ptr<T>() + p.s * m.y.stride[0];
  for (int g = p.group; g < p.end; ++g) {
    const HeadGroup group{static_cast<int>(m.state.shape[1]), P, G, g};
    a.norm_weight.dtype == DType::bf16
        ? norm_group(y, z, a.norm_weight.ptr<bf16>(), out, group, p.kept, a.eps, gated)
        : norm_group(y, z, a.norm_weight.ptr<float>(), out, group, p.kept, a.eps, gated);
  }
}

template <class T, class TimeStep, class State>
void run_all(const MambaStepArgs& a, Pool& pool) {
  const SsmArgs& m = a.ssm;
  const int64_t S = m.slots.shape[0], H = m.state.shape[1], P = m.state.shape[2], G = m.groups;
  const int64_t wanted =
      std::min(G, std::max<int64_t>(1, 2 * pool.threads() / std::max<int64_t>(1, S)));
  const int64_t length = (G + wanted - 1) / wanted, runs = (G + length - 1) / length;
  const Tensor& width = m.seq_width;
  const ActiveSizes heads{kOp, width, "seq_width", m.h_sizes, "h_sizes", H, m.groups, "sequence"};
  const ActiveSizes kept{kOp,         width, "seq_width", a.out_sizes,
                         "out_sizes", H,     m.groups,    "sequence"};
  pool.run(S * runs, [&](int64_t part, int thread) {
    const int64_t s = part / runs, first = part % runs * length;
    const SsmPlace place = ssm_place(pool, kOp, m, s);
    const Part p{s,
                 place.slot,
                 place.before,
                 static_cast<int>(first),
                 static_cast<int>(std::min(G, first + length)),
                 heads.at(pool, s),
                 kept.at(pool, s)};
    if (p.heads < 0 || p.kept < 0) return;
    if (!inside(pool, kOp, "out_sizes", p.kept, 0, p.heads, "sequence", s)) return;
    if (p.slot >= 0) return run_part<T, TimeStep, State>(a, p, pool.scratch(thread));
    T* out = m.y.ptr<T>() + s * m.y.stride[0];
    each_head(p, static_cast<int>(G), H,
              [&](int n) { std::memset(static_cast<void*>(out + n * P), 0, P * sizeof(T)); });
  });
}

}  // namespace

void mamba_step(const MambaStepArgs& a, Pool& pool) {
  ssm_by_kind(a.ssm, [&](auto x, auto dt, auto state) {
    run_all<decltype(x), decltype(dt), decltype(state)>(a, pool);
  });
}

}  // namespace ei::EI_ISA
