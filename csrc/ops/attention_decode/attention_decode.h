// attention_decode: one query token per sequence against its paged cache.
//   out[s, n] = sum over j < lengths[s] of softmax_j(scale * q[s, n] . k[j, n % Hkv]) * v[j, n %
//   Hkv]
// for query heads n < q_sizes[seq_width[s]] (Hq without seq_width), and zero for the other heads
// and for a sequence of length 0. Token j is in page page_table[s, j / 64] at offset j % 64.
//
// Every 8 pages make a partial result, and the partial results are joined in ascending order: where
// they are computed, and by how many threads, changes no bit.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

constexpr int64_t kSplitPages = 8;

struct AttentionDecodeArgs {
  Tensor q;                 // [S, Hq*K] f32 or bf16
  Tensor k_pages, v_pages;  // [pages, Hkv, 64, K], dtype of q or u8 (E4M3)
  Tensor out;               // [S, Hq*K], dtype of q
  Tensor page_table;        // [S, P] i32
  Tensor lengths;           // [S] i32
  Tensor seq_width;         // [S] i32, may be absent
  Tensor q_sizes;           // [W] i32 query heads
  float scale;
  float k_scale, v_scale;  // what the codes of E4M3 pages are multiplied by
};

EI_CPU_KERNEL(attention_decode, AttentionDecodeArgs)

}  // namespace ei
