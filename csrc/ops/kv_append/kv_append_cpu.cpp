// Computes: kv_append (kv_append.h).
// Layout: a page holds its 64 tokens of one head side by side, [Hkv][64][K].
// Work split: parts are runs of rows; rows write disjoint places.
// Limits: none.
// Speed: see the op table in the README (bench/ops.py).
#include "kv_append.h"

#include "cpu/vec.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

// to[0, n) = the codes of from[0, n) / scale.
template <class T>
void encode(const T* from, int64_t n, float scale, e4m3* to) {
  for (int64_t i = 0; i < n; ++i) from_float(to_float(from[i]) / scale, to[i]);
}

}  // namespace

void kv_append(const KvAppendArgs& a, Pool& pool) {
  const int64_t R = a.k.shape[0], pages = a.k_pages.shape[0], heads = a.k_pages.shape[1];
  const int64_t K = a.k_pages.shape[3], bytes = K * dtype_size(a.k.dtype);
  const bool codes = a.k_pages.dtype == DType::u8;
  const int64_t rows_per_part = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, heads * bytes));
  const auto scatter = [&](const Tensor& from, const Tensor& to, int64_t r, int64_t slot,
                           float scale) {
    const int64_t start = r * from.stride[0];
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = ((slot / 64 * heads + h) * 64 + slot % 64) * K, at = start + h * K;
      if (!codes)
        std::memmove(to.ptr<char>() + place / K * bytes,
                     from.ptr<char>() + at * dtype_size(from.dtype), bytes);
      else if (from.dtype == DType::bf16)
        encode(from.ptr<bf16>() + at, K, scale, to.ptr<e4m3>() + place);
      else
        encode(from.ptr<float>() + at, K, scale, to.ptr<e4m3>() + place);
    }
  };
  pool.run((R + rows_per_part - 1) / rows_per_part, [&](int64_t part, int) {
    for (int64_t r = part * rows_per_part; r < std::min(R, (part + 1) * rows_per_part); ++r) {
      const int32_t slot = read_once(a.slot_mapping, r);
      if (slot == -1) continue;
      if (slot < -1 || slot >= pages * 64) {
        pool.fail("kv_append: slot_mapping must hold -1 or slots in [0, " +
                  std::to_string(pages * 64) + "), got " + std::to_string(slot) + " at row " +
                  std::to_string(r));
        continue;
      }
      scatter(a.k, a.k_pages, r, slot, a.k_scale);
      scatter(a.v, a.v_pages, r, slot, a.v_scale);
    }
  });
}

}  // namespace ei::EI_ISA
