// Computes: attention_prefill (attention_prefill.h).
// Layout: a row of a block is one (token, query head); the query heads of a KV head are neighbours,
// so a
//   block of 64 rows reads keys and values once for all of them, also where a chunk is short.
// Work split: blocks are (64 rows, KV head, sequence), four warps 16 rows each, from the last rows
// to the
//   first (they see the most keys and start first). The grid is sized by the packed batch; blocks
//   beyond a sequence's own chunk leave at once. Pages of 64 keys pass through two stages of shared
//   memory; a block ends with the page that its last row sees.
// Order: pages ascending, at absolute positions; a page that a row does not see leaves its bits. So
//   where a prompt is cut into chunks changes no bit.
// Shared memory: two pages of keys and values, 64 KiB at K = 128; as much where the cache holds
//   E4M3 codes, which are copied as they are and widened to bfloat16 a page at a time.
// Limits: head sizes are multiples of 16 up to 256; bfloat16 beyond 128 and float32 take the plain
//   kernel below (a warp per row). q starts its rows at multiples of 16 bytes.
// Speed: not yet measured on a GPU. Floor: 4 K flops per row and key it sees.
// Source: Dao, "FlashAttention-2"; pages as in Kwon et al., "PagedAttention".
#include "attention_prefill.h"
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace ei::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16 * kWarps, kStages = 2;

// One sequence's chunk, and the query heads of one KV head in it.
struct Chunk {
  int first, tokens, before;  // row of q, tokens of the chunk, tokens before it
  int group, active;          // query heads of the KV head; how many the width has
  int h, Hkv, K;
  const int32_t* pages;

  EI_DEVICE Chunk(const AttentionPrefillArgs& a, int64_t s, int h_) : h(h_) {
    const int32_t* cu = a.cu_seqlens.ptr<int32_t>() + s;
    first = cu[0];
    tokens = cu[1] - cu[0];
    before = a.context.ptr<int32_t>()[s];
    Hkv = static_cast<int>(a.k_pages.shape[1]);
    K = static_cast<int>(a.k_pages.shape[3]);
    const int Hq = static_cast<int>(a.q.shape[1]) / K;
    group = Hq / Hkv;
    const int heads = active_size(a.seq_width, a.q_sizes, s, Hq);
    active = heads > h ? (heads - h + Hkv - 1) / Hkv : 0;
    pages = row<int32_t>(a.page_table, s);
  }
  EI_DEVICE int rows() const { return tokens * group; }
  // Keys that row i sees; 0 for rows beyond the chunk and for heads that the width lacks.
  EI_DEVICE int visible(int i) const {
    return i < rows() && i % group < active ? before + i / group + 1 : 0;
  }
  // Where row i is in q or out.
  template <class T>
  EI_DEVICE T* at(const Tensor& t, int i) const {
    return row<T>(t, first + i / group) + (h + i % group * Hkv) * K;
  }
  EI_DEVICE int64_t key(int j) const {  // of the pages
    return ((static_cast<int64_t>(pages[j / kPage]) * Hkv + h) * kPage + j % kPage) * K;
  }
};

template <int kHead, class KV>
struct Page {
  static constexpr int kBytes = kPage * kHead * 2;            // keys; as much for values
  static constexpr int kStaged = kPage * kHead * sizeof(KV);  // the same as the cache holds it
  static constexpr bool kCodes = sizeof(KV) == 1;
  static constexpr int kRing = kStages * 2 * kStaged + (kCodes ? 2 * kBytes : 0);
};

// Copies a page of keys and values; those of tokens that are not there become zero.
template <int kHead, class KV>
EI_DEVICE void stage(const AttentionPrefillArgs& a, const Chunk& c, char* keys, int page) {
  constexpr int V = kVector<KV>;
  const int chunks = c.K / V, there = c.before + c.tokens - page * kPage;
  const int64_t base = c.key(page * kPage);
  for (int i = threadIdx.x; i < kPage * chunks; i += kThreads) {
    const int r = i / chunks, chunk = i % chunks;
    const int64_t from = r < there ? base + r * c.K + chunk * V : 0;
    stage_chunk<kHead>(keys, r, chunk, a.k_pages.ptr<KV>() + from, r < there);
    stage_chunk<kHead>(keys + Page<kHead, KV>::kStaged, r, chunk, a.v_pages.ptr<KV>() + from,
                       r < there);
  }
}

template <int kHead, class KV>
__global__ void __launch_bounds__(kThreads)
    attend_pages(const __grid_constant__ AttentionPrefillArgs a) {
  using P = Page<kHead, KV>;
  constexpr int kStage = 2 * P::kStaged;
  EI_DYNAMIC_SHARED(char, ring);
  const Chunk c(a, blockIdx.z, blockIdx.y);
  const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows;
  if (block >= c.rows()) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int mine[2] = {block + warp * 16 + lane / 4, block + warp * 16 + lane / 4 + 8};
  const int sees[2] = {c.visible(mine[0]), c.visible(mine[1])};
  WarpRows<kHead> rows(c.K);
  rows.set_queries(sees[0] ? c.at<bf16>(a.q, mine[0]) : nullptr,
                   sees[1] ? c.at<bf16>(a.q, mine[1]) : nullptr);

  const int last_row = min(block + kRows, c.rows()) - 1;
  const int pages = c.active ? (c.before + last_row / c.group + kPage) / kPage : 0;
  EI_UNROLL
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < pages) stage<kHead, KV>(a, c, ring + i * kStage, i);
    commit_copies();
  }
  for (int page = 0; page < pages; ++page) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the page is there for all, and all have left the one before
    const int ahead = page + kStages - 1;
    if (ahead < pages) stage<kHead, KV>(a, c, ring + ahead % kStages * kStage, ahead);
    commit_copies();
    const char* keys = ring + page % kStages * kStage;
    if constexpr (P::kCodes) {
      char* wide = ring + kStages * kStage;
      widen<kHead>(keys, wide, 2 * kPage, c.K, threadIdx.x, kThreads);  // keys, then values
      __syncthreads();
      keys = wide;
    }
    const int visible[2] = {sees[0] - page * kPage, sees[1] - page * kPage};
    rows.template attend<kPage>(keys, keys + P::kBytes, a.scale * a.k_scale * kLog2e, visible);
  }
  EI_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (mine[i] >= c.rows()) continue;
    const float scale = sees[i] ? a.v_scale / rows.l[i] : 0.0f;
    uint32_t* out = reinterpret_cast<uint32_t*>(c.at<bf16>(a.out, mine[i]));
    EI_UNROLL
    for (int k = 0; k < kHead / 8; ++k)
      if (k * 8 < c.K)
        out[k * 4 + lane % 4] = pack_bf16(rows.o[k][2 * i] * scale, rows.o[k][2 * i + 1] * scale);
  }
  wait_copies<0>();
}

// ---- float32, and large heads: a warp per row

struct PlainRooms {
  PlainRoom of_warp[kWarps];
};

template <class T, class KV>
__global__ void __launch_bounds__(kThreads)
    attend_plain(const __grid_constant__ AttentionPrefillArgs a) {
  EI_SHARED(PlainRooms, rooms);
  const Chunk c(a, blockIdx.z, blockIdx.y);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int i = blockIdx.x * kWarps + warp;
  if (i >= c.rows()) return;
  const int sees = c.visible(i);
  PlainRow mine(rooms.of_warp[warp], sees ? c.at<T>(a.q, i) : static_cast<T*>(nullptr), c.K,
                a.scale * a.k_scale);
  for (int key = 0; key < sees; key += kWarp)
    mine.attend(a.k_pages.ptr<KV>(), a.v_pages.ptr<KV>(), key, min(key + kWarp, sees),
                [&](int j) { return c.key(j); });
  EI_UNROLL
  for (int k = 0; k < PlainRow::kSteps; ++k)
    if (lane + k * kWarp < c.K)
      from_float(sees ? mine.o[k] / mine.l * a.v_scale : 0.0f, c.at<T>(a.out, i)[lane + k * kWarp]);
}

// T of the queries, KV of the pages.
template <class T, class KV>
void launch_typed(const AttentionPrefillArgs& a, const CudaCall& call) {
  const int64_t Hkv = a.k_pages.shape[1], K = a.k_pages.shape[3];
  const int64_t rows = a.q.shape[0] * (a.q.shape[1] / K / Hkv);
  const auto grid = [&](int per_block) {
    return dim3(static_cast<unsigned>(ceil_div(rows, per_block)), static_cast<unsigned>(Hkv),
                static_cast<unsigned>(a.context.shape[0]));
  };
  if constexpr (sizeof(T) == 2) {
    if (K <= 64)
      return launch(call, attend_pages<64, KV>, grid(kRows), kThreads, Page<64, KV>::kRing, a);
    if (K <= 128)
      return launch(call, attend_pages<128, KV>, grid(kRows), kThreads, Page<128, KV>::kRing, a);
  }
  launch(call, attend_plain<T, KV>, grid(kWarps), kThreads, 0, a);
}

void launch_attention_prefill(const AttentionPrefillArgs& a, const CudaCall& call) {
  require_grid("attention_prefill", "context", a.context);
  require_aligned("attention_prefill", "q", a.q);
  require_aligned("attention_prefill", "out", a.out);
  require_aligned("attention_prefill", "k_pages", a.k_pages);
  require_aligned("attention_prefill", "v_pages", a.v_pages);
  if (a.k_pages.shape[3] > kMostHead)
    throw std::invalid_argument(
        "attention_prefill: k_pages must have a head size of at most 256, got " +
        a.k_pages.describe());
  const bool codes = a.k_pages.dtype == DType::u8;
  if (a.q.dtype == DType::bf16)
    codes ? launch_typed<bf16, e4m3>(a, call) : launch_typed<bf16, bf16>(a, call);
  else
    codes ? launch_typed<float, e4m3>(a, call) : launch_typed<float, float>(a, call);
}

const RegisterCuda<AttentionPrefillArgs, launch_attention_prefill> registered("attention_prefill");

}  // namespace
}  // namespace ei::cuda
