// Computes: softmax_stats (softmax_stats.h).
// Layout: rows where they lie; the last block of a row is copied and filled up with -inf.
// Work split: parts are rows.
// Order: with z = (logit - largest) / temperature, exp(z) and z exp(z) are summed in float within
//   64 tokens (lanes, then pairwise), in double beyond, ascending: a row's bits are its own.
// Limits: V < 2^31.
// Speed: see the op table in the README (bench/cpu/ops.py).
#include "softmax_stats.h"

#include <limits>

#include "cpu/vec.h"
#include "host/pool.h"

namespace ei::EI_ISA {
namespace {

constexpr int kBlock = 64;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Calls f(block of kBlock values) for all of a row.
template <class F>
void for_blocks(const float* row, int64_t n, const F& f) {
  int64_t first = 0;
  for (; first + kBlock <= n; first += kBlock) f(row + first);
  if (first == n) return;
  alignas(64) float last[kBlock];
  std::fill(std::copy(row + first, row + n, last), last + kBlock, kNone);
  f(last);
}

// The largest value of a row; NaN if there is one in it.
float largest(const float* row, int64_t n) {
  V top = V::set(kNone), nan = V::set(0.0f);
  for_blocks(row, n, [&](const float* x) {
    for (int i = 0; i < kBlock; i += V::kLanes) {
      const V v = V::load(x + i);
      top = max(v, top);
      nan = propagate_nan(v, nan);
    }
  });
  return max_lane(top) + sum(nan);
}

}  // namespace

void softmax_stats(const SoftmaxStatsArgs& a, Pool& pool) {
  const int64_t R = a.logits.shape[0], n = a.logits.shape[1];
  pool.run(R, [&](int64_t r, int) {
    const float* row = a.logits.ptr<float>() + r * a.logits.stride[0];
    const float top = largest(row, n), temperature = a.temperature.ptr<float>()[r];
    if (!std::isfinite(top)) {
      a.log_sum.ptr<float>()[r] = top;
      a.entropy.ptr<float>()[r] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const V most = V::set(top), by = V::set(temperature);
    const V nothing = V::set(-104.0f);  // exp() of it is 0, and 0 times it is none
    double mass = 0, weighted = 0;
    for_blocks(row, n, [&](const float* x) {
      V masses = V::set(0.0f), products = V::set(0.0f);
      for (int i = 0; i < kBlock; i += V::kLanes) {
        const V z = max(div(sub(V::load(x + i), most), by), nothing);
        const V p = exp(z);
        masses = add(masses, p);
        products = fma(z, p, products);
      }
      mass += sum(masses);
      weighted += sum(products);
    });
    a.log_sum.ptr<float>()[r] =
        static_cast<float>(static_cast<double>(top) / temperature + std::log(mass));
    a.entropy.ptr<float>()[r] = static_cast<float>(std::log(mass) - weighted / mass);
  });
}

}  // namespace ei::EI_ISA
