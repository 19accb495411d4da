// Computes: causal_conv (causal_conv.h).
// Layout: row-major tokens; a thread owns 16 bytes of channels side by side, keeps their taps in
//   registers and walks over its tokens with a window of the last four inputs.
// Work split: blocks are (run of 32 tokens of the packed batch, 64 threads of channels). A run may
//   hold many sequences (decode) or a piece of one (prefill); pieces re-read three rows.
//   The block in which a sequence begins does its first three tokens, reads its history and then
//   writes it anew from the sequence's last inputs; no other block touches it, so the order of
//   blocks cannot matter.
// Order: bias, then taps from the oldest to the newest. A token's value depends on its four inputs
//   alone, so prefill in pieces and steps give the same bits.
// Shared memory: none.
// Limits: rows of x and out start at multiples of 16 bytes.
// Speed: not yet measured on a GPU. Floor: x read, out written, history in and out.
// Source: Dao and Gu, "Transformers are SSMs" (Mamba-2 block).
#include "causal_conv.h"
#include "cuda/launch.cuh"
#include "cuda/mamba.cuh"

namespace ei::cuda {
namespace {

constexpr int kRun = 32, kThreads = 64;

// The sequence that token t belongs to: the last one that begins at or before it and is not empty.
EI_DEVICE int find_sequence(const int32_t* begin, int sequences, int t) {
  int low = 0, high = sequences;  // begin[low] <= t < begin[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (begin[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class T, class W>
struct Channels {
  static constexpr int V = kVector<T>;
  float weight[V][kTaps], bias[V];
  float window[V][kHistory];  // the last inputs, oldest first

  EI_DEVICE void load_taps(const CausalConvArgs& a, int first) {
    const W* w = a.weight.ptr<W>() + first * kTaps;
    for (int i = 0; i < V; ++i) {
      for (int k = 0; k < kTaps; ++k) weight[i][k] = to_float(w[i * kTaps + k]);
      bias[i] = to_float(a.bias.ptr<W>()[first + i]);
    }
  }
  EI_DEVICE void load_history(const T* state) {
    for (int i = 0; i < V; ++i)
      for (int k = 0; k < kHistory; ++k) window[i][k] = to_float(state[i * kHistory + k]);
  }
  EI_DEVICE void load_window(const CausalConvArgs& a, int t, int first) {
    for (int k = 0; k < kHistory; ++k) {
      float past[V];
      load(row<T>(a.x, t - kHistory + k) + first, past);
      for (int i = 0; i < V; ++i) window[i][k] = past[i];
    }
  }
  // One token: its output to `out`, and it joins the window.
  EI_DEVICE void step(const T* x, T* out) {
    float now[V], y[V];
    load(x, now);
    for (int i = 0; i < V; ++i) y[i] = convolved(bias[i], weight[i], window[i], now[i]);
    store(out, y);
    for (int i = 0; i < V; ++i) {
      for (int k = 0; k + 1 < kHistory; ++k) window[i][k] = window[i][k + 1];
      window[i][kHistory - 1] = now[i];
    }
  }
};

// state = the last inputs of a sequence, older history moving up where it is shorter than that.
template <class T>
EI_DEVICE void write_history(T* state, const CausalConvArgs& a, int start, int stop, int first) {
  for (int k = 0; k < kHistory; ++k) {
    const int from = stop - kHistory + k;
    for (int i = 0; i < kVector<T>; ++i)
      state[i * kHistory + k] =
          from < start ? state[i * kHistory + k + stop - start] : row<T>(a.x, from)[first + i];
  }
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads) convolve(const __grid_constant__ CausalConvArgs a) {
  constexpr int V = kVector<T>;
  const int first = (blockIdx.y * kThreads + threadIdx.x) * V;
  if (first >= a.x.shape[1]) return;
  const int S = static_cast<int>(a.slots.shape[0]);
  const int32_t* cu = a.cu_seqlens.ptr<int32_t>();
  const int begin = blockIdx.x * kRun, end = min(begin + kRun, cu[S]);
  Channels<T, W> channels;
  channels.load_taps(a, first);
  if (begin >= end) return;
  for (int s = find_sequence(cu, S, begin); s < S && cu[s] < end; ++s) {
    const int32_t slot = a.slots.ptr<int32_t>()[s];
    const int start = cu[s], stop = cu[s + 1];
    const bool begins = start >= begin;
    // The block where a sequence begins does its first three tokens in any case, and only it.
    int t = begins ? start : max(begin, start + kHistory);
    const int last = min(stop, begins ? max(end, start + kHistory) : end);
    if (slot < 0 || t >= last) continue;
    if (first < a.x_channels && first >= active_size(a.seq_width, a.x_sizes, s, a.x_channels))
      continue;
    T* state = a.state.ptr<T>() + slot * a.state.stride[0] + first * kHistory;
    if (begins)
      channels.load_history(state);
    else
      channels.load_window(a, t, first);
    for (; t < last; ++t) channels.step(row<T>(a.x, t) + first, row<T>(a.out, t) + first);
    if (begins) write_history(state, a, start, stop, first);
  }
}

void launch_causal_conv(const CausalConvArgs& a, const CudaCall& call) {
  require_aligned("causal_conv", "x", a.x);
  require_aligned("causal_conv", "out", a.out);
  const bool x16 = a.x.dtype == DType::bf16;
  const int64_t channels = kThreads * (x16 ? kVector<bf16> : kVector<float>);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.x.shape[0], kRun)),
                  static_cast<unsigned>(ceil_div(a.x.shape[1], channels)));
  if (!x16)
    launch(call, convolve<float, float>, grid, kThreads, 0, a);
  else if (a.weight.dtype == DType::bf16)
    launch(call, convolve<bf16, bf16>, grid, kThreads, 0, a);
  else
    launch(call, convolve<bf16, float>, grid, kThreads, 0, a);
}

const RegisterCuda<CausalConvArgs, launch_causal_conv> registered("causal_conv");

}  // namespace
}  // namespace ei::cuda
