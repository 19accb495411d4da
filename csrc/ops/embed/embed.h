// embed: out[r, c] = table[ids[r], c] for c < n, with n = sizes[row_width[r]] (D without
// row_width); out beyond n is left as it is. A gather of rows: the table may be any matrix.
#pragma once
#include "../../core/isa.h"
#include "../../core/tensor.h"

namespace ei {

struct EmbedArgs {
  Tensor ids;        // [R] i32
  Tensor table;      // [V, D] f32 or bf16
  Tensor out;        // [R, D], dtype of table
  Tensor row_width;  // [R] i32, may be absent
  Tensor sizes;      // [W] i32
};

EI_CPU_KERNEL(embed, EmbedArgs)

}  // namespace ei
