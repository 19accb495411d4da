// Computes: attention_prefill (attention_prefill.h).
// Layout: the query heads of one KV head, for a few tokens of one page, are the lanes of a block
//   (cpu/attention.h).
// Work split: parts are (sequence, block of tokens, KV head), the longest contexts first.
// Order: pages ascending; within one, as cpu/attention.h says.
// Scratch: a block.
// Limits: K is a multiple of 16. A token's output is finite only if the values of the tokens that
//   follow it in its block are (they are weighed with zero).
// Speed: see the op table in the README (bench/ops.py).
#include "attention_prefill.h"

#include "cpu/attention.h"
#include "cpu/attention_sizes.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

constexpr const char* kOp = "attention_prefill";

// What a sequence reads: rows [first, first + tokens) of q, after `before` tokens.
struct Chunk {
  int64_t first, tokens, before;
};

// That of sequence s; nothing after a report.
Chunk chunk_of(const AttentionPrefillArgs& a, Pool& pool, int64_t s) {
  const Span span = span_of(pool, kOp, a.cu_seqlens, s, a.q.shape[0]);
  const int64_t before = read_once(a.context, s), tokens = span.end - span.begin;
  const int64_t most = a.page_table.shape[1] * kPage - tokens;
  if (tokens == 0 || !inside(pool, kOp, "context", before, 0, most, "sequence", s))
    return {0, 0, 0};
  return {span.begin, tokens, before};
}

// Tokens [begin, end) of the chunk of sequence s, all at positions within one page.
struct Block {
  int64_t s;
  Chunk chunk;
  int64_t begin, end;
};

class Blocks {
 public:
  Blocks(const AttentionPrefillArgs& a, Pool& pool, int64_t tokens)
      : a_(a), pool_(pool), tokens_(tokens) {
    for (int64_t s = 0; s < a.context.shape[0]; ++s) count_ += of(chunk_of(a, pool, s));
  }

  int64_t count() const { return count_; }

  // Block i of all, the last of a sequence first; empty if the tables have changed since.
  Block at(int64_t i) const {
    for (int64_t s = 0; s < a_.context.shape[0]; ++s) {
      const Chunk chunk = chunk_of(a_, pool_, s);
      const int64_t blocks = of(chunk);
      if (i < blocks) {
        // In blocks, from the sequence's start.
        const int64_t place = chunk.before / tokens_ + blocks - 1 - i;
        return {s, chunk, std::max<int64_t>(0, place * tokens_ - chunk.before),
                std::min(chunk.tokens, (place + 1) * tokens_ - chunk.before)};
      }
      i -= blocks;
    }
    return {0, {0, 0, 0}, 0, 0};
  }

 private:
  int64_t of(const Chunk& c) const {
    return c.tokens == 0 ? 0 : (c.before + c.tokens - 1) / tokens_ - c.before / tokens_ + 1;
  }

  const AttentionPrefillArgs& a_;
  Pool& pool_;
  int64_t tokens_;
  int64_t count_ = 0;
};

template <class T, class KV>
void attend_block(const AttentionPrefillArgs& a, Pool& pool, const Block& block, int64_t h,
                  float* scratch) {
  const int64_t Hkv = a.k_pages.shape[1], K = a.k_pages.shape[3];
  const int64_t group = a.q.shape[1] / K / Hkv;
  const ActiveSizes sizes{kOp,       a.seq_width, "seq_width", a.q_sizes,
                          "q_sizes", Hkv * group, 1,           "sequence"};
  const int64_t heads = sizes.at(pool, block.s);
  const int active = heads > h ? static_cast<int>((heads - h + Hkv - 1) / Hkv) : 0;
  const int64_t first_row = block.chunk.first + block.begin;
  const int64_t before = block.chunk.before + block.begin;  // position of the first
  const int tokens = static_cast<int>(block.end - block.begin);
  const int64_t seen = before + tokens;  // keys that the last token sees

  const AttentionBlock b = place_block(scratch, tokens * active, static_cast<int>(K));
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < active; ++i) {
      const T* q = a.q.ptr<T>() + (first_row + t) * a.q.stride[0] + (h + i * Hkv) * K;
      set_query(b, t * active + i, q, a.scale * a.k_scale);
      b.visible[t * active + i] = static_cast<float>(before + t + 1);
    }
  fill_spare_rows(b, tokens * active);
  reset_block(b);
  const int64_t row = block.s * a.page_table.stride[0];
  for (int64_t first = 0; first < seen && active > 0; first += kPage) {
    const int64_t page = read_once(a.page_table, row + first / kPage);
    if (!inside(pool, kOp, "page_table", page, 0, a.k_pages.shape[0] - 1, "sequence", block.s))
      continue;
    const int64_t at = (page * Hkv + h) * kPage * K;
    const int n = static_cast<int>(std::min<int64_t>(kPage, seen - first));
    const bool own = first + kPage > before;  // the page that the block's tokens are in
    attend_page(b, a.k_pages.ptr<KV>() + at, a.v_pages.ptr<KV>() + at, n, own, first);
  }
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < group; ++i) {
      T* out = a.out.ptr<T>() + (first_row + t) * a.out.stride[0] + (h + i * Hkv) * K;
      if (i < active)
        write_result(b, t * active + i, a.v_scale, out);
      else
        std::memset(static_cast<void*>(out), 0, K * sizeof(T));
    }
}

}  // namespace

void attention_prefill(const AttentionPrefillArgs& a, Pool& pool) {
  const int64_t Hkv = a.k_pages.shape[1], K = a.k_pages.shape[3];
  const bool codes = a.k_pages.dtype == DType::u8;
  const Blocks blocks(a, pool, prefill_tokens(a.q.shape[1] / K / Hkv));
  pool.run(blocks.count() * Hkv, [&](int64_t part, int thread) {
    auto* scratch = reinterpret_cast<float*>(pool.scratch(thread));
    const Block block = blocks.at(part / Hkv);
    if (block.begin == block.end) return;
    if (a.q.dtype == DType::bf16)
      codes ? attend_block<bf16, e4m3>(a, pool, block, part % Hkv, scratch)
            : attend_block<bf16, bf16>(a, pool, block, part % Hkv, scratch);
    else
      codes ? attend_block<float, e4m3>(a, pool, block, part % Hkv, scratch)
            : attend_block<float, float>(a, pool, block, part % Hkv, scratch);
  });
}

}  // namespace ei::EI_ISA
