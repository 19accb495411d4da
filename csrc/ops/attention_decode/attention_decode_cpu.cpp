// Computes: attention_decode (attention_decode.h).
// Layout: the query heads of one KV head are the lanes of a block (cpu/attention.h).
// Work split: parts are (sequence, KV head); with few sequences, (KV head, 8 pages) of one sequence
//   after the other.
// Order: keys ascending within 8 pages from zero, partial results of 8 pages joined ascending.
// Scratch: a block, a joined result, and this thread's share of one sequence's partial results.
// Limits: K is a multiple of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "attention_decode.h"

#include "cpu/attention.h"
#include "cpu/attention_sizes.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

constexpr const char* kOp = "attention_decode";

struct Shape {
  int64_t S, Hkv, group;
  int K;
};

// Tokens of sequence s; 0 after a report.
int64_t length_of(const AttentionDecodeArgs& a, Pool& pool, int64_t s) {
  const int32_t length = read_once(a.lengths, s);
  const int64_t most = a.page_table.shape[1] * kPage;
  return inside(pool, kOp, "lengths", length, 0, most, "sequence", s) ? length : 0;
}

// o, m, l of a block, in a stretch of memory of their own.
AttentionBlock place_partial(AttentionBlock b, float* at) {
  b.o = at;
  b.m = at + static_cast<int64_t>(b.lanes) * b.K;
  b.l = b.m + b.lanes;
  return b;
}

// total = total joined with the keys after it.
void join(const AttentionBlock& total, const AttentionBlock& next) {
  for (int row = 0; row < total.lanes; row += V::kLanes) {
    const V a = V::load(total.m + row), b = V::load(next.m + row), top = max(a, b);
    const V fade = exp(sub(a, top)), weight = exp(sub(b, top));
    store(total.m + row, top);
    store(total.l + row,
          add(mul(V::load(total.l + row), fade), mul(V::load(next.l + row), weight)));
    const RowPlace at = row_place(total, row);
    for (int c = 0; c < total.K; ++c) {
      float* o = total.o + at.base + static_cast<int64_t>(c) * at.step;
      const V add_to = V::load(next.o + at.base + static_cast<int64_t>(c) * at.step);
      store(o, add(mul(V::load(o), fade), mul(add_to, weight)));
    }
  }
}

template <class T, class KV>
class Sequence {
 public:
  Sequence(const AttentionDecodeArgs& a, const Shape& shape, Pool& pool, int64_t s, int64_t h,
           int64_t length, float* scratch)
      : a_(a), shape_(shape), pool_(pool), s_(s), h_(h), length_(length) {
    const ActiveSizes sizes{kOp,       a.seq_width, "seq_width",
                            a.q_sizes, "q_sizes",   shape.Hkv * shape.group,
                            1,         "sequence"};
    const int64_t heads = sizes.at(pool, s);
    active_ =
        length_ > 0 && heads > h ? static_cast<int>((heads - h + shape.Hkv - 1) / shape.Hkv) : 0;
    block = place_block(scratch, active_, shape.K);
    for (int i = 0; i < active_; ++i) {
      set_query(block, i, a.q.ptr<T>() + s * a.q.stride[0] + head(i) * shape.K,
                a.scale * a.k_scale);
      block.visible[i] = static_cast<float>(length_);
    }
    fill_spare_rows(block, active_);
  }

  int active() const { return active_; }
  int64_t splits() const { return (length_ + kSplitPages * kPage - 1) / (kSplitPages * kPage); }

  // The block's o, m, l := attention to the keys of one split.
  void attend(int64_t split, const AttentionBlock& b) const {
    const int64_t row = s_ * a_.page_table.stride[0], pages = a_.k_pages.shape[0];
    reset_block(b);
    const int64_t end = std::min<int64_t>((split + 1) * kSplitPages * kPage, length_);
    for (int64_t first = split * kSplitPages * kPage; first < end; first += kPage) {
      const int64_t page = read_once(a_.page_table, row + first / kPage);
      if (!inside(pool_, kOp, "page_table", page, 0, pages - 1, "sequence", s_)) continue;
      const int64_t at = (page * shape_.Hkv + h_) * kPage * shape_.K;
      const int n = static_cast<int>(std::min<int64_t>(kPage, end - first));
      attend_page(b, a_.k_pages.ptr<KV>() + at, a_.v_pages.ptr<KV>() + at, n, n < kPage, first);
    }
  }

  void write(const AttentionBlock& b) const {
    T* out = a_.out.ptr<T>() + s_ * a_.out.stride[0];
    for (int i = 0; i < shape_.group; ++i)
      if (i < active_)
        write_result(b, i, a_.v_scale, out + head(i) * shape_.K);
      else
        std::memset(static_cast<void*>(out + head(i) * shape_.K), 0, shape_.K * sizeof(T));
  }

  AttentionBlock block;

 private:
  int64_t head(int i) const { return h_ + i * shape_.Hkv; }

  const AttentionDecodeArgs& a_;
  const Shape& shape_;
  Pool& pool_;
  int64_t s_, h_;
  int64_t length_;
  int active_;
};

template <class T, class KV>
void all_splits(const AttentionDecodeArgs& a, const Shape& shape, Pool& pool, int64_t s, int64_t h,
                float* scratch) {
  const Sequence<T, KV> sequence(a, shape, pool, s, h, length_of(a, pool, s), scratch);
  const AttentionBlock total =
      place_partial(sequence.block, scratch + attention_floats(shape.group, shape.K));
  if (sequence.active() > 0) {
    sequence.attend(0, total);
    for (int64_t i = 1; i < sequence.splits(); ++i) {
      sequence.attend(i, sequence.block);
      join(total, sequence.block);
    }
  }
  sequence.write(total);
}

// One sequence on all threads; partial results are kept in the scratch of all of them.
template <class T, class KV>
void shared_splits(const AttentionDecodeArgs& a, const Shape& shape, int64_t s, Pool& pool) {
  constexpr int64_t keys = kSplitPages * kPage;
  const int64_t length = length_of(a, pool, s), splits = (length + keys - 1) / keys;
  const int64_t one = partial_floats(shape.group, shape.K);
  const auto scratch = [&](int64_t thread) {
    return reinterpret_cast<float*>(pool.scratch(static_cast<int>(thread)));
  };
  const auto kept = [&](int64_t split, int64_t h) {
    const int64_t slot = split / pool.threads() * shape.Hkv + h;
    return scratch(split % pool.threads()) + attention_floats(shape.group, shape.K) +
           (1 + slot) * one;
  };
  pool.run(splits * shape.Hkv, [&](int64_t part, int thread) {
    const int64_t h = part % shape.Hkv, split = part / shape.Hkv;
    const Sequence<T, KV> sequence(a, shape, pool, s, h, length, scratch(thread));
    if (sequence.active() > 0)
      sequence.attend(split, place_partial(sequence.block, kept(split, h)));
  });
  pool.run(shape.Hkv, [&](int64_t h, int thread) {
    const Sequence<T, KV> sequence(a, shape, pool, s, h, length, scratch(thread));
    const AttentionBlock total = place_partial(sequence.block, kept(0, h));
    if (sequence.active() > 0)
      for (int64_t i = 1; i < splits; ++i) join(total, place_partial(total, kept(i, h)));
    sequence.write(total);
  });
}

template <class T, class KV>
void decode(const AttentionDecodeArgs& a, Pool& pool) {
  const int64_t Hkv = a.k_pages.shape[1], K = a.k_pages.shape[3];
  const Shape shape{a.q.shape[0], Hkv, a.q.shape[1] / K / Hkv, static_cast<int>(K)};
  const auto* lengths = a.lengths.ptr<int32_t>();
  const bool several_splits =
      std::any_of(lengths, lengths + shape.S, [](int32_t n) { return n > kSplitPages * kPage; });
  if (several_splits && pool.threads() > 1 && shape.S * Hkv < 2 * pool.threads()) {
    for (int64_t s = 0; s < shape.S; ++s) shared_splits<T, KV>(a, shape, s, pool);
    return;
  }
  pool.run(shape.S * Hkv, [&](int64_t part, int thread) {
    all_splits<T, KV>(a, shape, pool, part / Hkv, part % Hkv,
                      reinterpret_cast<float*>(pool.scratch(thread)));
  });
}

}  // namespace

void attention_decode(const AttentionDecodeArgs& a, Pool& pool) {
  const bool codes = a.k_pages.dtype == DType::u8;
  if (a.q.dtype == DType::bf16)
    codes ? decode<bf16, e4m3>(a, pool) : decode<bf16, bf16>(a, pool);
  else
    codes ? decode<float, e4m3>(a, pool) : decode<float, float>(a, pool);
}

}  // namespace ei::EI_ISA
