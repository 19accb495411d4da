// embed: out[r, c] = table[id[r], c] for c < n, with n = sizes[row_width[r]] (D without
// row_width); out beyond n is left as it is. A gather of rows: the table may be any matrix.
//
// id[r] = ids[r]; with a feed, where feed[r] >= 0, it is drawn[feed[r]], which another op wrote: so
// a token that `sample` drew is read on without a way through the host. A fed id of -1 is none (its
// row could not be drawn): that row of out is left as it is.
#pragma once
#include <string>

#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct EmbedArgs {
  Tensor ids;        // [R] i32
  Tensor table;      // [V, D] f32 or bf16
  Tensor out;        // [R, D], dtype of table
  Tensor row_width;  // [R] i32, may be absent
  Tensor sizes;      // [W] i32
  Tensor drawn;      // [N] i32 in [-1, V), may be absent
  Tensor feed;       // [R] i32 in [-1, N), with drawn
};

// The id of row r, outside the table where it has none. Static: one for each instruction set.
EI_HOST_DEVICE static inline int32_t embed_id(const EmbedArgs& a, int64_t r) {
  const int32_t from = a.feed ? a.feed.ptr<int32_t>()[r] : -1;
  if (from < 0) return a.ids.ptr<int32_t>()[r];
  return from < a.drawn.shape[0] ? a.drawn.ptr<int32_t>()[from] : -1;
}

// What is wrong with the id of row r, as "<argument> must <requirement>, got <value>"; empty if it
// is in the table, or a fed -1.
std::string embed_problem(const EmbedArgs& a, int64_t r);

EI_CPU_KERNEL(embed, EmbedArgs)

}  // namespace ei
