// sample: one token id per row of logits.
//
// With temperature 0 the id of the largest logit, of equal ones the smallest. Otherwise, with
//   z[v] = (logits[v] - max of the row) / temperature,  p = softmax(z),
// the kept tokens are found in this order, each step on what the one before has left:
//   min_p: exp(z[v]) >= min_p;
//   top_k: z[v] is at least the top_k-th largest (equal ones stay; 0, -1 or V and more: all);
//   top_p: the tokens before v, by descending z and ascending id, hold less than the share top_p of
//          the probability that is left (so the first always stays; 1: all);
// and the id is the kept v with the largest z[v] - log(-log(1 - u[v])) (Gumbel-max; of equal ones
// the smallest id), u[v] = (r[v] + 1/2) / 2^32, r[v] = word v % 4 of Philox4x32-10 with
// counter (v / 4, position low, position high, 0) and key (seed low, seed high).
// So a row's id depends on its own logits, parameters, seed and position alone.
//
// -1 where the row holds NaN or +inf, or nothing but -inf.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct SampleArgs {
  Tensor logits;       // [R, V] f32, rows dense
  Tensor ids;          // [R] i32
  Tensor temperature;  // [R] f32, finite, >= 0
  Tensor top_k;        // [R] i32, >= -1
  Tensor top_p;        // [R] f32 in (0, 1]
  Tensor min_p;        // [R] f32 in [0, 1]
  Tensor seed;         // [R] i64
  Tensor position;     // [R] i64
};

// What a row needs: its z, filled up to blocks of 64, a sortable copy, and the blocks' maxima.
inline int64_t sample_scratch_bytes(int64_t V) { return (V + 63) / 64 * (64 * (4 + 8) + 4); }

EI_CPU_KERNEL(sample, SampleArgs)

}  // namespace ei
