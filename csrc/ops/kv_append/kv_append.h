// kv_append: writes the keys and values of new tokens into their places in the paged cache:
//   k_pages[slot / 64, h, slot % 64, :] = k[r, h*K : (h+1)*K], and v alike, slot = slot_mapping[r].
// A row with slot -1 is skipped.
#pragma once
#include "../../core/isa.h"
#include "../../core/tensor.h"

namespace ei {

struct KvAppendArgs {
  Tensor k, v;              // [R, Hkv*K] f32 or bf16
  Tensor k_pages, v_pages;  // [pages, Hkv, 64, K], dtype of k
  Tensor slot_mapping;      // [R] i32
};

EI_CPU_KERNEL(kv_append, KvAppendArgs)

}  // namespace ei
