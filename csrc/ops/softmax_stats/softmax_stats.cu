// Computes: softmax_stats (softmax_stats.h).
// Layout: rows where they lie; the second pass finds them in the second-level cache.
// Work split: one block per row. First pass: the largest logit; second: both sums.
// Order: by thread, 16 values in float, then in double, ascending; then lanes by butterfly; then
//   warps, ascending. It depends on the row alone.
// Shared memory: two numbers per warp.
// Limits: V < 2^31.
// Speed: not yet measured on a GPU. Floor: the logits read once.
// Source: none.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "softmax_stats.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kFloats = 16;

struct Shared {
  float tops[kWarps], nans[kWarps];
  double masses[kWarps], products[kWarps];
};

EI_DEVICE double sum_of_warp(double v) {
  EI_UNROLL
  for (int step = 0; step < 5; ++step) v += shuffle(v, (threadIdx.x % kWarp) ^ (1 << step));
  return v;
}

// The largest value of a row, the same in each thread; NaN if there is one in it.
EI_DEVICE float largest(const float* row, int n, Shared& shared) {
  float top = -INFINITY, nan = 0.0f;
  for (int v = threadIdx.x; v < n; v += kThreads) {
    const float x = row[v];
    if (x != x) nan = 1.0f;
    top = fmaxf(top, x);
  }
  top = max_lanes(top);
  nan = max_lanes(nan);
  if (threadIdx.x % kWarp == 0) {
    shared.tops[threadIdx.x / kWarp] = top;
    shared.nans[threadIdx.x / kWarp] = nan;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    top = fmaxf(top, shared.tops[w]);
    nan = fmaxf(nan, shared.nans[w]);
  }
  return nan > 0.0f ? NAN : top;
}

__global__ void __launch_bounds__(kThreads) stats(const __grid_constant__ SoftmaxStatsArgs a) {
  begin_kernel();
  EI_SHARED(Shared, shared);
  const int64_t r = blockIdx.x;
  const int n = static_cast<int>(a.logits.shape[1]);
  const float* logits = row<float>(a.logits, r);
  const float top = largest(logits, n, shared), temperature = a.temperature.ptr<float>()[r];
  float& log_sum = a.log_sum.ptr<float>()[r];
  float& entropy = a.entropy.ptr<float>()[r];
  if (top - top != 0.0f) {  // NaN or infinite
    if (threadIdx.x == 0) {
      log_sum = top;
      entropy = NAN;
    }
    return;
  }
  double mass = 0.0, weighted = 0.0;
  for (int first = threadIdx.x; first < n; first += kThreads * kFloats) {
    float some = 0.0f, product = 0.0f;
    EI_UNROLL_BY(4)
    for (int i = 0; i < kFloats; ++i) {
      const int v = first + i * kThreads;
      if (v >= n) break;
      const float z = fmaxf((logits[v] - top) / temperature, -104.0f), p = expf(z);
      some += p;
      product += z * p;
    }
    mass += some;
    weighted += product;
  }
  mass = sum_of_warp(mass);
  weighted = sum_of_warp(weighted);
  if (threadIdx.x % kWarp == 0) {
    shared.masses[threadIdx.x / kWarp] = mass;
    shared.products[threadIdx.x / kWarp] = weighted;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  mass = weighted = 0.0;
  for (int w = 0; w < kWarps; ++w) {
    mass += shared.masses[w];
    weighted += shared.products[w];
  }
  const double logarithm = log(mass);
  log_sum = static_cast<float>(top / temperature + logarithm);
  entropy = static_cast<float>(logarithm - weighted / mass);
}

void launch_softmax_stats(const SoftmaxStatsArgs& a, const CudaCall& call) {
  launch_early(call, stats, dim3(static_cast<unsigned>(a.logits.shape[0])), kThreads, 0, a);
}

const RegisterCuda<SoftmaxStatsArgs, launch_softmax_stats> registered("softmax_stats");

}  // namespace
}  // namespace ei::cuda
