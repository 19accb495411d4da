// Computes: causal_conv (causal_conv.h).
// Layout: row-major tokens; weight, bias and history of a block are brought to [tap][channel] once.
// Work split: parts are (sequence, block of channels).
// Order: bias, then taps from the oldest to the newest, one fused multiply-add each; a token's
//   value depends on its four inputs alone, so prefill in pieces and steps give the same bits.
// Limits: C, x_channels and x_sizes are multiples of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "causal_conv.h"

#include "cpu/mamba.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

constexpr int kBlock = 128;

template <class T>
struct Block {
  alignas(64) float weight[kTaps][kBlock];
  alignas(64) float bias[kBlock];
  alignas(64) T history[kHistory][kBlock];
};

template <class T, class W>
void load_block(const CausalConvArgs& a, const T* state, int64_t first, int n, Block<T>& block) {
  const W* weight = a.weight.ptr<W>() + first * kTaps;
  const W* bias = a.bias.ptr<W>() + first;
  for (int c = 0; c < n; ++c) {
    for (int k = 0; k < kTaps; ++k) block.weight[k][c] = to_float(weight[c * kTaps + k]);
    for (int k = 0; k < kHistory; ++k) block.history[k][c] = state[c * kHistory + k];
    block.bias[c] = to_float(bias[c]);
  }
}

// The channels [first, first + n) of one sequence of one token: history and weights are used from
// where they lie.
template <class T, class W>
void step_block(const CausalConvArgs& a, int64_t token, int64_t slot, int64_t first, int n) {
  conv_token(a.x.ptr<T>() + token * a.x.stride[0] + first, a.weight.ptr<W>() + first * kTaps,
             a.bias.ptr<W>() + first,
             a.state.ptr<T>() + slot * a.state.stride[0] + first * kHistory,
             a.out.ptr<T>() + token * a.out.stride[0] + first, n);
}

// The channels [first, first + n) of one sequence of `tokens` tokens; n <= kBlock.
template <class T, class W>
void run_block(const CausalConvArgs& a, int64_t token, int64_t tokens, int64_t slot, int64_t first,
               int n) {
  Block<T> block;
  T* state = a.state.ptr<T>() + slot * a.state.stride[0] + first * kHistory;
  load_block<T, W>(a, state, first, n, block);
  const int64_t stride = a.x.stride[0];
  const T* x = a.x.ptr<T>() + token * stride + first;
  T* out = a.out.ptr<T>() + token * a.out.stride[0] + first;
  const auto row = [&](int64_t t) { return t < 0 ? block.history[kHistory + t] : x + t * stride; };
  for (int64_t t = 0; t < tokens; ++t, out += a.out.stride[0]) {
    const T *x0 = row(t - 3), *x1 = row(t - 2), *x2 = row(t - 1), *x3 = row(t);
    for (int c = 0; c < n; c += V::kLanes) {
      V sum = fma(V::load(block.weight[0] + c), V::load(x0 + c), V::load(block.bias + c));
      sum = fma(V::load(block.weight[1] + c), V::load(x1 + c), sum);
      sum = fma(V::load(block.weight[2] + c), V::load(x2 + c), sum);
      sum = fma(V::load(block.weight[3] + c), V::load(x3 + c), sum);
      store(out + c, silu(sum));
    }
  }
  for (int k = 0; k < kHistory; ++k) {
    const T* kept = row(tokens - kHistory + k);
    for (int c = 0; c < n; ++c) state[c * kHistory + k] = kept[c];
  }
}

template <class T, class W>
void run_all(const CausalConvArgs& a, Pool& pool) {
  const int64_t S = a.slots.shape[0], C = a.x.shape[1];
  const int64_t x_blocks = (a.x_channels + kBlock - 1) / kBlock;
  const int64_t blocks = x_blocks + (C - a.x_channels + kBlock - 1) / kBlock;
  const ActiveSizes sizes{"causal_conv", a.seq_width,  "seq_width", a.x_sizes,
                          "x_sizes",     a.x_channels, 16,          "sequence"};
  pool.run(S * blocks, [&](int64_t part, int) {
    const int64_t s = part / blocks, block = part % blocks;
    const int32_t slot = read_once(a.slots, s);
    if (!inside(pool, "causal_conv", "slots", slot, -1, a.state.shape[0] - 1, "sequence", s))
      return;
    const Span span = span_of(pool, "causal_conv", a.cu_seqlens, s, a.x.shape[0]);
    const int64_t tokens = span.end - span.begin;
    if (slot < 0 || tokens == 0) return;
    int64_t first = block * kBlock, end = a.x_channels;
    if (block >= x_blocks) {
      first = a.x_channels + (block - x_blocks) * kBlock;
      end = C;
    } else {
      end = sizes.at(pool, s);
    }
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    if (n <= 0) return;
    if (tokens == 1) return step_block<T, W>(a, span.begin, slot, first, n);
    run_block<T, W>(a, span.begin, tokens, slot, first, n);
  });
}

}  // namespace

void causal_conv(const CausalConvArgs& a, Pool& pool) {
  const bool w16 = a.weight.dtype == DType::bf16;
  if (a.x.dtype == DType::f32) return run_all<float, float>(a, pool);
  w16 ? run_all<bf16, bf16>(a, pool) : run_all<bf16, float>(a, pool);
}

}  // namespace ei::EI_ISA
