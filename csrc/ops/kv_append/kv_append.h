// kv_append: writes the keys and values of new tokens into their places in the paged cache:
//   k_pages[slot / 64, h, slot % 64, :] = k[r, h*K : (h+1)*K], and v alike, slot = slot_mapping[r].
// A row with slot -1 is skipped. Pages of E4M3 codes hold k / k_scale and v / v_scale, divided in
// float and rounded to nearest, ties to even; beyond 448 the largest code, NaN as NaN.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

struct KvAppendArgs {
  Tensor k, v;              // [R, Hkv*K] f32 or bf16
  Tensor k_pages, v_pages;  // [pages, Hkv, 64, K], dtype of k or u8 (E4M3)
  Tensor slot_mapping;      // [R] i32
  float k_scale, v_scale;   // what the codes of E4M3 pages are multiplied by
};

EI_CPU_KERNEL(kv_append, KvAppendArgs)

}  // namespace ei
