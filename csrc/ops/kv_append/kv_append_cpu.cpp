// Computes: kv_append (kv_append.h).
// Layout: a page holds its 64 tokens of one head side by side, [Hkv][64][K].
// Work split: parts are runs of rows; rows write disjoint places.
// Limits: none.
// Speed: see the op table in the README (bench/ops.py).
#include "kv_append.h"

#include "../../core/pool.h"
#include "../../core/vec.h"

namespace ei::EI_ISA {

void kv_append(const KvAppendArgs& a, Pool& pool) {
  const int64_t R = a.k.shape[0], pages = a.k_pages.shape[0], heads = a.k_pages.shape[1];
  const int64_t bytes = a.k_pages.shape[3] * dtype_size(a.k.dtype);
  const int64_t rows_per_part = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, heads * bytes));
  const auto scatter = [&](const Tensor& from, const Tensor& to, int64_t r, int64_t slot) {
    const char* row = from.ptr<char>() + r * from.stride[0] * dtype_size(from.dtype);
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(to.ptr<char>() + ((slot / 64 * heads + h) * 64 + slot % 64) * bytes,
                  row + h * bytes, bytes);
  };
  pool.run((R + rows_per_part - 1) / rows_per_part, [&](int64_t part, int) {
    for (int64_t r = part * rows_per_part; r < std::min(R, (part + 1) * rows_per_part); ++r) {
      const int32_t slot = a.slot_mapping.ptr<int32_t>()[r];
      if (slot == -1) continue;
      if (slot < -1 || slot >= pages * 64) {
        pool.fail("kv_append: slot_mapping must hold -1 or slots in [0, " +
                  std::to_string(pages * 64) + "), got " + std::to_string(slot) + " at row " +
                  std::to_string(r));
        continue;
      }
      scatter(a.k, a.k_pages, r, slot);
      scatter(a.v, a.v_pages, r, slot);
    }
  });
}

}  // namespace ei::EI_ISA
