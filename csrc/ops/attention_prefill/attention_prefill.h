// attention_prefill: the tokens of a chunk of each sequence against its paged cache, causally.
// Token t of [T] is number i = t - cu_seqlens[s] of its sequence's chunk and stands at position
// p = context[s] + i; its key and value are in the pages already.
//   out[t, n] = sum over j <= p of softmax_j(scale * q[t, n] . k[j, n % Hkv]) * v[j, n % Hkv]
// for query heads n < q_sizes[seq_width[s]] (Hq without seq_width), and zero for the other heads.
// Token j is in page page_table[s, j / 64] at offset j % 64. Rows of out from cu_seqlens[S] on are
// left as they are.
//
// Key tiles are pages and blocks of queries lie within one page, both at absolute positions: where
// a prompt is cut into chunks changes no bit.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct AttentionPrefillArgs {
  Tensor q;                 // [T, Hq*K] f32 or bf16
  Tensor k_pages, v_pages;  // [pages, Hkv, 64, K], dtype of q or u8 (E4M3)
  Tensor out;               // [T, Hq*K], dtype of q
  Tensor page_table;        // [S, P] i32
  Tensor cu_seqlens;        // [S+1] i32
  Tensor context;           // [S] i32 tokens in the cache before the chunk
  Tensor seq_width;         // [S] i32, may be absent
  Tensor q_sizes;           // [W] i32 query heads
  float scale;
  float k_scale, v_scale;  // what the codes of E4M3 pages are multiplied by
};

EI_CPU_KERNEL(attention_prefill, AttentionPrefillArgs)

}  // namespace ei
