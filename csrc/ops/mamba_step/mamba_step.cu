// Computes: mamba_step (mamba_step.h) in one launch.
// Layout: as ssm_step.cu has the state: a warp holds 4 rows of it in registers, all reads of which
//   are under way before anything else is read. Convolved B, C and x lie in shared memory.
// Work split: blocks are (32 state rows of a head of a group, group, sequence): 128 for a sequence
//   of 64 heads x 64, whatever the group. Every block convolves its own x, and its group's B and C
//   again (18 bytes a channel, from the second-level cache: 4.6 KB beside 32 KB of state at N =
//   128). It leaves y in `out` and arrives at the counter of (sequence, group). The block that
//   arrives last norms the group, which reads what the others left, moves on the history of B and
//   C, which till then they may still read, and sets the counter to zero for the next launch. Which
//   block that is changes nothing: it adds in the order of gated_norm. No block waits for another,
//   and a replayed graph finds the counters as the first launch did.
// Order: as in causal_conv, ssm_step and gated_norm, whose bits these are.
// Shared memory: B, C and x as floats (at most 2.2 KiB), one float per channel of the group.
// Limits: P and N are multiples of 16, N at most 256; the state starts at multiples of 16 bytes,
//   rows of z and out too; a group has at most 24 Ki channels.
// Speed: not yet measured on a GPU. Floor: the state in and out once; at one sequence of 64 heads
//   (4.2 MB, 1 us of an H200's memory) the chain of reads decides: state and inputs, then arrival,
//   then y and z, each a trip to memory, where three launches would be three of their own.
// Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block).
#include "cuda/launch.cuh"
#include "cuda/mamba.cuh"
#include "cuda/ssm.cuh"
#include "mamba_step.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = kWarps * kSsmRows;

struct Shared {
  alignas(16) float inputs[2 * kSsmMaxState + kRows];  // B, C [N], then x of the block's rows
  float sums[kWarps];
  bool last;
};

// The history of channel c of a slot, and how it takes up a new input.
template <class T>
EI_DEVICE T* history_of(const MambaStepArgs& a, int64_t slot, int c) {
  return a.conv_state.ptr<T>() + slot * a.conv_state.stride[0] + c * kHistory;
}
template <class T>
EI_DEVICE void take_up(T* history, T now) {
  for (int k = 0; k + 1 < kHistory; ++k) history[k] = history[k + 1];
  history[kHistory - 1] = now;
}

// The convolution of channel c of sequence s. `moves`: the history takes up the new input.
template <class T>
EI_DEVICE float convolve(const MambaStepArgs& a, int64_t s, int64_t slot, int c, bool moves) {
  T* kept = history_of<T>(a, slot, c);
  const T now = row<T>(a.ssm.x, s)[c];  // B and C follow x in its row
  float weight[kTaps], history[kHistory];
  for (int k = 0; k < kTaps; ++k) weight[k] = value_at(a.conv_weight, c * kTaps + k);
  for (int k = 0; k < kHistory; ++k) history[k] = to_float(kept[k]);
  if (moves) take_up(kept, now);
  return rounded<T>(convolved(value_at(a.conv_bias, c), weight, history, to_float(now)));
}

// What a block is there for.
struct Part {
  int64_t s, slot;
  int group, head, first, active;  // first: of its state rows; active: heads of the group
  bool mine;                       // the head is among these
};

// Channel i < 2 N of the group's B and C.
EI_DEVICE int shared_channel(const MambaStepArgs& a, const Part& p, int i) {
  const int N = static_cast<int>(a.ssm.state.shape[3]), bc = static_cast<int>(a.ssm.B.shape[1]);
  return static_cast<int>(a.ssm.x.shape[1]) + p.group * N + (i < N ? i : bc + i - N);
}

// Convolves B, C and the x of the block's rows into shared memory.
template <class T>
EI_DEVICE void convolve_inputs(const MambaStepArgs& a, const Part& p, float* inputs) {
  const int P = static_cast<int>(a.ssm.state.shape[2]), N = static_cast<int>(a.ssm.state.shape[3]);
  const int rows = p.mine ? min(kRows, P - p.first) : 0, x = p.head * P + p.first;
  EI_UNROLL_BY(1)
  for (int i = threadIdx.x; i < 2 * N + rows; i += kThreads) {
    const bool own = i >= 2 * N;
    inputs[i] = convolve<T>(a, p.s, p.slot, own ? x + i - 2 * N : shared_channel(a, p, i), own);
  }
}

// The history of the group's B and C takes up the new inputs.
template <class T>
EI_DEVICE void move_history(const MambaStepArgs& a, const Part& p) {
  EI_UNROLL_BY(1)
  for (int i = threadIdx.x; i < 2 * a.ssm.state.shape[3]; i += kThreads) {
    const int c = shared_channel(a, p, i);
    take_up(history_of<T>(a, p.slot, c), row<T>(a.ssm.x, p.s)[c]);
  }
}

// The block's rows of state and of y.
template <class T, class State, int kSteps>
EI_DEVICE void step_block(const MambaStepArgs& a, const Part& p, Shared& shared) {
  const SsmArgs& m = a.ssm;
  const int P = static_cast<int>(m.state.shape[2]), N = static_cast<int>(m.state.shape[3]);
  const int within = threadIdx.x / kWarp * kSsmRows, first = p.first + within;
  const bool mine = p.mine && first < P;
  State* state = state_row<State>(m, p.slot, p.head, mine ? first : 0);
  StateRows<kSteps> rows(N);
  if (mine) rows.read(state);
  convolve_inputs<T>(a, p, shared.inputs);
  __syncthreads();
  if (!mine) return;
  float x[kSsmRows];
  for (int i = 0; i < kSsmRows; ++i) x[i] = shared.inputs[2 * N + within + i];
  step_rows(rows, m, p.s, p.head, shared.inputs, shared.inputs + N, x,
            row<T>(m.y, p.s) + p.head * P + first);
  if constexpr (sizeof(State) == 2)
    rows.round(state_key(m, read_before(m, p.s) + 1, p.head) + static_cast<uint32_t>(first * N));
  rows.write(state);
}

template <class T, class State, int kSteps>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ MambaStepArgs a) {
  begin_kernel();
  EI_SHARED(Shared, shared);
  EI_DYNAMIC_SHARED(float, gated);
  const SsmArgs& m = a.ssm;
  const int H = static_cast<int>(m.state.shape[1]), P = static_cast<int>(m.state.shape[2]);
  const int slices = (P + kRows - 1) / kRows, i = blockIdx.x / slices, G = m.groups;
  Part p;
  p.s = blockIdx.z, p.group = blockIdx.y;
  p.slot = m.slots.ptr<int32_t>()[p.s];
  p.head = i * G + p.group, p.first = static_cast<int>(blockIdx.x) % slices * kRows;
  p.active =
      p.slot < 0 ? 0 : heads_of_group(active_size(m.seq_width, m.h_sizes, p.s, H), p.group, G);
  p.mine = i < p.active;
  // Where no head is active, one block is there for the history and the zeros.
  if (!p.mine && blockIdx.x > 0) return;
  if (p.slot >= 0) {
    step_block<T, State, kSteps>(a, p, shared);
    int32_t* counter = a.arrivals.ptr<int32_t>() + p.s * G + p.group;
    __syncthreads();  // the block's rows of y are there, and it has read the history
    if (threadIdx.x == 0) {
      shared.last = arrive(counter) == max(1, p.active * slices) - 1;
      if (shared.last) *counter = 0;
    }
    __syncthreads();
    if (!shared.last) return;
    move_history<T>(a, p);
  }
  const int kept = active_size(m.seq_width, a.out_sizes, p.s, H);
  T* out = row<T>(m.y, p.s);
  norm_group(
      out, row<T>(a.z, p.s), out, H, P, G, p.group,
      p.slot < 0 ? 0 : heads_of_group(kept, p.group, G), a.eps,
      [&](int c) { return value_at(a.norm_weight, c); }, gated, shared.sums);
}

void launch_mamba_step(const MambaStepArgs& a, const CudaCall& call) {
  require_grid("mamba_step", "slots", a.ssm.slots);
  require_aligned("mamba_step", "state", a.ssm.state);
  require_aligned("mamba_step", "z", a.z);
  require_aligned("mamba_step", "out", a.ssm.y);
  require_shared("mamba_step", "out", a.ssm.y, a.ssm.y.shape[1] / a.ssm.groups * 4);
  const int64_t P = a.ssm.state.shape[2], of_group = a.ssm.state.shape[1] / a.ssm.groups;
  const dim3 grid(static_cast<unsigned>(ceil_div(P, kRows) * of_group),
                  static_cast<unsigned>(a.ssm.groups), static_cast<unsigned>(a.ssm.slots.shape[0]));
  by_kind(a.ssm, [&](auto x, auto state, auto steps) {
    launch_early(call, step<decltype(x), decltype(state), steps()>, grid, kThreads,
                 of_group * P * 4, a);
  });
}

const RegisterCuda<MambaStepArgs, launch_mamba_step> registered("mamba_step");

}  // namespace
}  // namespace ei::cuda
