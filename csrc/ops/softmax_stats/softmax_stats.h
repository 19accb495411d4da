// softmax_stats: what softmax(logits[r] / temperature[r]) is like, for each row r:
//   log_sum[r] = log sum over v of exp(logits[r, v] / temperature[r]),
//   entropy[r] = - sum over v of p[v] log p[v], in nats.
// So the log-probability of a token is logits[r, v] / temperature[r] - log_sum[r].
//
// A row with NaN gives NaN; one with +inf has log_sum +inf, one of nothing but -inf -inf, and
// neither has an entropy (NaN).
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct SoftmaxStatsArgs {
  Tensor logits;       // [R, V] f32, rows dense
  Tensor temperature;  // [R] f32, finite, > 0
  Tensor log_sum;      // [R] f32
  Tensor entropy;      // [R] f32
};

EI_CPU_KERNEL(softmax_stats, SoftmaxStatsArgs)

}  // namespace ei
