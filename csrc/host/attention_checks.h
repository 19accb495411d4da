// Argument checks that attention_prefill and attention_decode share.
#pragma once
#include <cmath>

#include "host/check.h"

namespace ei {

// The scale of E4M3 pages: a code stands for its value times the scale. Other pages have none.
inline void check_page_scale(const Checker& check, const Tensor& pages, double scale,
                             const char* name) {
  const float kept = static_cast<float>(scale);
  if (!std::isfinite(kept) || kept <= 0.0f)
    check.fail(name, "be finite and above 0 in float32", std::to_string(scale));
  if (pages.dtype != DType::u8 && scale != 1.0)
    check.fail(name, "be 1 unless the pages are uint8 (E4M3)", std::to_string(scale));
}

// Checks q, the pages and out, binding `rows`, pages, Hkv and K; returns Hq.
inline int64_t check_heads(Checker& check, const Tensor& q, const Tensor& k_pages,
                           const Tensor& v_pages, const Tensor& out, const char* rows, double scale,
                           double k_scale, double v_scale) {
  check(q, "q").dtype({DType::f32, DType::bf16}).shape({rows, "Hq*K"}).rows_dense();
  check(k_pages, "k_pages").dtype({q.dtype, DType::u8});
  check(k_pages, "k_pages").shape({"pages", "Hkv", 64, "K"}).contiguous();
  check(v_pages, "v_pages").dtype({k_pages.dtype}).shape({"pages", "Hkv", 64, "K"}).contiguous();
  check(out, "out").dtype({q.dtype}).shape({rows, "Hq*K"}).rows_dense();
  const int64_t K = check["K"], Hkv = check["Hkv"], row = check["Hq*K"];
  if (K < 16 || K % 16 != 0)
    check.fail("k_pages", "have a head size that is a multiple of 16", k_pages.describe());
  if (Hkv < 1 || row < 1 || row % (Hkv * K) != 0)
    check.fail("q", "have Hq*K columns, Hq a multiple of the " + std::to_string(Hkv) + " KV heads",
               q.describe());
  if (!std::isfinite(scale)) check.fail("scale", "be finite", std::to_string(scale));
  check_page_scale(check, k_pages, k_scale, "k_scale");
  check_page_scale(check, v_pages, v_scale, "v_scale");
  return row / K;
}

// Sequence s of `tokens` tokens fits its row of the page table, whose needed entries are pages.
inline void check_pages(const Checker& check, const Tensor& page_table, int64_t s, int64_t tokens,
                        const char* name) {
  const int64_t most = page_table.shape[1] * 64;
  if (tokens < 0 || tokens > most)
    check.fail(name,
               "give each sequence 0 to " + std::to_string(most) + " tokens, as page_table holds",
               std::to_string(tokens) + " at sequence " + std::to_string(s));
  const int32_t* row = page_table.ptr<int32_t>() + s * page_table.stride[0];
  for (int64_t p = 0; p * 64 < tokens; ++p)
    if (row[p] < 0 || row[p] >= check["pages"])
      check.fail("page_table",
                 "hold pages in [0, " + std::to_string(check["pages"]) + ") where needed",
                 std::to_string(row[p]) + " for page " + std::to_string(p) + " of sequence " +
                     std::to_string(s));
}

}  // namespace ei
