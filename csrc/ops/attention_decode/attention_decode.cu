// Computes: attention_decode (attention_decode.h).
// Layout: the query heads of one KV head are the 16 rows of a matrix instruction (more: further
//   groups of 16), so the arithmetic stays far below the time of reading the cache.
// Work split: blocks are (split of the keys, KV head and 16 query heads, sequence). Splits are
//   whole pages; their number follows from the shapes of q and page_table alone, never from
//   lengths, so one captured launch serves all of them; splits beyond a length leave at once. Under
//   batch_invariant a sequence's own length says how many pages its splits have: at least 4, and as
//   many as give at most 32 splits. The price: one or two long sequences fill fewer blocks. In a
//   block each of four warps takes every fourth run of 16 keys, copies it into its own part of
//   shared memory a few runs ahead, and keeps its own softmax: no barrier until the warps are
//   joined at the end. With more than one split a second kernel joins their results.
// Order: keys of a warp ascending; warps, then splits, ascending.
// Shared memory: 96 KiB of runs (K = 128), 80 KiB where pages hold E4M3 codes, which are copied as
//   they are and widened to bfloat16 a run at a time, then the warps' results in the same place.
// Workspace: o, m and l of every split in float; under batch_invariant of up to 32 per sequence.
// Limits: head sizes are multiples of 16 up to 256; bfloat16 beyond 128 and float32 take the plain
//   kernel below. q starts its rows at multiples of 16 bytes.
// Speed: not yet measured on a GPU. Floor: keys and values of the sequences' own lengths read once.
// Source: Dao et al., "Flash-Decoding for long-context inference".
#include "attention_decode.h"
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace ei::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16, kRun = 16;

constexpr int kOwnPages = 4, kOwnSplits = 32;  // under batch_invariant: least pages, most splits

// How the work is divided, from the shapes alone.
struct Plan {
  int Hkv, K, group, tiles;  // tiles: groups of 16 query heads of one KV head
  int pages;                 // of one split; 0: by each sequence's own length
  int splits;                // most splits of a sequence
  float* partial;            // [S][Hq][splits][K + 2]: o, then m and l; null with one split

  int64_t floats(int64_t S) const { return splits > 1 ? S * Hkv * group * splits * (K + 2) : 0; }
};

Plan make_plan(const AttentionDecodeArgs& a, const CudaCall& call) {
  constexpr int64_t kWantedBlocks = 512;  // some per multiprocessor
  Plan p{};
  p.Hkv = static_cast<int>(a.k_pages.shape[1]);
  p.K = static_cast<int>(a.k_pages.shape[3]);
  p.group = static_cast<int>(a.q.shape[1] / p.K / p.Hkv);
  p.tiles = static_cast<int>(ceil_div(p.group, kRows));
  const int64_t table = std::max<int64_t>(a.page_table.shape[1], 1);
  if (call.batch_invariant) {
    p.splits = static_cast<int>(std::min<int64_t>(kOwnSplits, ceil_div(table, kOwnPages)));
    return p;
  }
  const int64_t wanted = table * a.q.shape[0] * p.Hkv * p.tiles / kWantedBlocks;
  p.pages = 1;
  while (p.pages < wanted && p.pages < table) p.pages *= 2;
  p.splits = static_cast<int>(ceil_div(table, p.pages));
  return p;
}

// Keys of one split of a sequence of `length`.
EI_DEVICE int keys_of_split(const Plan& p, int length) {
  if (p.pages) return p.pages * kPage;
  const int own = (length + kPage - 1) / kPage;
  return max(kOwnPages, (own + kOwnSplits - 1) / kOwnSplits) * kPage;
}

// What a block needs of its sequence.
struct Sequence {
  int length, first, end;  // keys of this split
  int active;              // query heads of the KV head that the width has
  const int32_t* pages;
};
EI_DEVICE Sequence sequence_of(const AttentionDecodeArgs& a, const Plan& p, int64_t s, int h) {
  Sequence q;
  q.length = a.lengths.ptr<int32_t>()[s];
  const int keys = keys_of_split(p, q.length);
  q.first = min(static_cast<int>(blockIdx.x) * keys, q.length);
  q.end = min(q.first + keys, q.length);
  const int heads = active_size(a.seq_width, a.q_sizes, s, p.Hkv * p.group);
  q.active = heads > h ? (heads - h + p.Hkv - 1) / p.Hkv : 0;
  q.pages = row<int32_t>(a.page_table, s);
  return q;
}

// The result of one query head over a split: written out, or kept for the join. o(c) is the
// unnormalised output of channel c, for the threads c of `step`.
template <class T, class Output>
EI_DEVICE void finish(const AttentionDecodeArgs& a, const Plan& p, int64_t s, int n, float m,
                      float l, int c, int step, const Output& o) {
  if (p.partial) {
    float* to = p.partial + ((s * p.Hkv * p.group + n) * p.splits + blockIdx.x) * (p.K + 2);
    if (c == 0) to[p.K] = m, to[p.K + 1] = l;
    for (; c < p.K; c += step) to[c] = o(c);
  } else {
    T* out = row<T>(a.out, s) + n * p.K;
    for (; c < p.K; c += step) from_float(l > 0.0f || l != l ? o(c) / l * a.v_scale : 0.0f, out[c]);
  }
}

// ---- bfloat16 on tensor cores

template <int kHead, class KV>
struct Ring {
  static constexpr int kStages = 3;
  static constexpr bool kCodes = sizeof(KV) == 1;
  static constexpr int kRunBytes = kRun * kHead * 2;         // keys, and as much for values
  static constexpr int kStaged = kRun * kHead * sizeof(KV);  // the same as the pages hold it
  static constexpr int kWide = kCodes ? 2 * kRunBytes : 0;   // codes that were widened
  static constexpr int kWarpBytes = kStages * 2 * kStaged + kWide;
  static constexpr int kBytes = kWarps * kWarpBytes;
};

// What the warps of a block found, in the place of the ring.
template <int kHead>
struct Found {
  float o[kWarps][kRows][kHead + 2], m[kWarps][kRows], l[kWarps][kRows];
};

// Copies the run of keys from `key` on to shared memory; keys from `end` on become zero.
template <int kHead, class KV>
EI_DEVICE void stage(const AttentionDecodeArgs& a, const Plan& p, const Sequence& q, int h,
                     char* keys, int key) {
  const int64_t page = q.pages[key / kPage];
  const int64_t at = ((page * p.Hkv + h) * kPage + key % kPage) * p.K;
  constexpr int V = kVector<KV>;
  const int chunks = p.K / V;
  for (int i = threadIdx.x % kWarp; i < kRun * chunks; i += kWarp) {
    const int r = i / chunks, chunk = i % chunks;
    const bool there = key + r < q.end;
    const int64_t from = there ? at + r * p.K + chunk * V : 0;
    stage_chunk<kHead>(keys, r, chunk, a.k_pages.ptr<KV>() + from, there);
    stage_chunk<kHead>(keys + Ring<kHead, KV>::kStaged, r, chunk, a.v_pages.ptr<KV>() + from,
                       there);
  }
}

template <int kHead, class KV>
__global__ void __launch_bounds__(kThreads)
    attend_split(const __grid_constant__ AttentionDecodeArgs a, const __grid_constant__ Plan p) {
  begin_kernel();
  using R = Ring<kHead, KV>;
  EI_DYNAMIC_SHARED(char, shared);
  const int64_t s = blockIdx.z;
  const int h = blockIdx.y / p.tiles, first_row = blockIdx.y % p.tiles * kRows;
  const Sequence q = sequence_of(a, p, s, h);
  if (p.partial && q.first >= q.end) return;  // the join looks at no split beyond the length
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  char* mine = shared + warp * R::kWarpBytes;
  const auto query = [&](int i) {
    return first_row + i < q.active ? row<bf16>(a.q, s) + (h + (first_row + i) * p.Hkv) * p.K
                                    : nullptr;
  };
  WarpRows<kHead> rows(p.K);
  rows.set_queries(query(lane / 4), query(lane / 4 + 8));

  const int end = first_row < q.active ? q.end : q.first;  // nobody to attend: no keys
  const int from = q.first + warp * kRun, step = kWarps * kRun;
  EI_UNROLL
  for (int i = 0; i < R::kStages - 1; ++i) {
    if (from + i * step < end)
      stage<kHead, KV>(a, p, q, h, mine + i * 2 * R::kStaged, from + i * step);
    commit_copies();
  }
  int now = 0;
  for (int key = from; key < end; key += step) {
    const int ahead = key + (R::kStages - 1) * step, slot = (now + R::kStages - 1) % R::kStages;
    if (ahead < end) stage<kHead, KV>(a, p, q, h, mine + slot * 2 * R::kStaged, ahead);
    commit_copies();
    wait_copies<R::kStages - 1>();
    sync_warp();  // what the other lanes copied is there too
    const char* keys = mine + now * 2 * R::kStaged;
    if constexpr (R::kCodes) {
      char* wide = mine + R::kStages * 2 * R::kStaged;
      widen<kHead>(keys, wide, 2 * kRun, p.K, lane, kWarp);  // keys, then values
      sync_warp();
      keys = wide;
    }
    const int visible[2] = {first_row + lane / 4 < q.active ? end - key : 0,
                            first_row + lane / 4 + 8 < q.active ? end - key : 0};
    rows.template attend<kRun>(keys, keys + R::kRunBytes, a.scale * a.k_scale * kLog2e, visible);
    sync_warp();  // before this slot is written again
    now = (now + 1) % R::kStages;
  }
  wait_copies<0>();
  __syncthreads();

  Found<kHead>& found = *reinterpret_cast<Found<kHead>*>(shared);
  EI_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int r = lane / 4 + 8 * i;
    if (lane % 4 == 0) found.m[warp][r] = rows.m[i], found.l[warp][r] = rows.l[i];
    EI_UNROLL
    for (int c = 0; c < kHead / 8; ++c)
      for (int j = 0; j < 2; ++j) found.o[warp][r][c * 8 + lane % 4 * 2 + j] = rows.o[c][2 * i + j];
  }
  __syncthreads();
  for (int i = warp; i < kRows && first_row + i < p.group; i += kWarps) {
    float m = kNothingSeen, l = 0.0f, weight[kWarps];
    for (int w = 0; w < kWarps; ++w) m = fmaxf(m, found.m[w][i]);
    EI_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      weight[w] = exp2_fast(found.m[w][i] - finite_maximum(m));
      l = fused(found.l[w][i], weight[w], l);
    }
    finish<bf16>(a, p, s, h + (first_row + i) * p.Hkv, m, l, lane, kWarp, [&](int c) {
      float o = 0.0f;
      EI_UNROLL
      for (int w = 0; w < kWarps; ++w) o = fused(found.o[w][i][c], weight[w], o);
      return o;
    });
  }
}

// ---- float32, and large heads: a block per query head, each warp every fourth run of 32 keys

struct PlainFound {
  PlainRoom room[kWarps];
  float o[kWarps][kMostHead], m[kWarps], l[kWarps];
};

template <class T, class KV>
__global__ void __launch_bounds__(kThreads)
    attend_plain(const __grid_constant__ AttentionDecodeArgs a, const __grid_constant__ Plan p) {
  begin_kernel();
  EI_SHARED(PlainFound, found);
  const int64_t s = blockIdx.z;
  const int n = blockIdx.y, h = n % p.Hkv;
  const Sequence q = sequence_of(a, p, s, h);
  if (p.partial && q.first >= q.end) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool active = n / p.Hkv < q.active;
  PlainRow mine(found.room[warp], active ? row<T>(a.q, s) + n * p.K : static_cast<T*>(nullptr), p.K,
                a.scale * a.k_scale);
  const auto at = [&](int j) {
    return ((static_cast<int64_t>(q.pages[j / kPage]) * p.Hkv + h) * kPage + j % kPage) * p.K;
  };
  for (int key = q.first + warp * kWarp; active && key < q.end; key += kWarps * kWarp)
    mine.attend(a.k_pages.ptr<KV>(), a.v_pages.ptr<KV>(), key, min(key + kWarp, q.end), at);
  EI_UNROLL
  for (int i = 0; i < PlainRow::kSteps; ++i) found.o[warp][lane + i * kWarp] = mine.o[i];
  if (lane == 0) found.m[warp] = mine.m * kLog2e, found.l[warp] = mine.l;
  __syncthreads();
  float top = kNothingSeen, total = 0.0f, weight[kWarps];
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, found.m[w]);
  EI_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    weight[w] = exp2_fast(found.m[w] - finite_maximum(top));
    total = fused(found.l[w], weight[w], total);
  }
  finish<T>(a, p, s, n, top, total, threadIdx.x, kThreads, [&](int c) {
    float sum = 0.0f;
    EI_UNROLL
    for (int w = 0; w < kWarps; ++w) sum = fused(found.o[w][c], weight[w], sum);
    return sum;
  });
}

// ---- joining the splits of one query head

template <class T>
__global__ void __launch_bounds__(kThreads)
    join(const __grid_constant__ AttentionDecodeArgs a, const __grid_constant__ Plan p) {
  begin_kernel();
  const int64_t s = blockIdx.y;
  const int n = blockIdx.x, length = a.lengths.ptr<int32_t>()[s];
  const int keys = keys_of_split(p, length), splits = (length + keys - 1) / keys;
  const float* all = p.partial + (s * p.Hkv * p.group + n) * p.splits * (p.K + 2);
  const auto of = [&](int i) { return all + i * (p.K + 2); };  // a split: o, then m and l
  float m = kNothingSeen, l = 0.0f;
  for (int i = 0; i < splits; ++i) m = fmaxf(m, of(i)[p.K]);
  for (int i = 0; i < splits; ++i)
    l = fused(of(i)[p.K + 1], exp2_fast(of(i)[p.K] - finite_maximum(m)), l);
  for (int c = threadIdx.x; c < p.K; c += kThreads) {
    float o = 0.0f;
    for (int i = 0; i < splits; ++i)
      o = fused(of(i)[c], exp2_fast(of(i)[p.K] - finite_maximum(m)), o);
    from_float(l > 0.0f || l != l ? o / l * a.v_scale : 0.0f, row<T>(a.out, s)[n * p.K + c]);
  }
}

int64_t workspace_bytes(const AttentionDecodeArgs& a, const CudaCall& call) {
  return make_plan(a, call).floats(a.q.shape[0]) * 4;
}

// T of the queries, KV of the pages.
template <class T, class KV>
void launch_typed(const AttentionDecodeArgs& a, const Plan& p, const CudaCall& call) {
  const unsigned S = static_cast<unsigned>(a.q.shape[0]), Hq = p.Hkv * p.group;
  if constexpr (sizeof(T) == 2) {
    const dim3 grid(p.splits, p.Hkv * p.tiles, S);
    if (p.K <= 64)
      return launch_early(call, attend_split<64, KV>, grid, kThreads, Ring<64, KV>::kBytes, a, p);
    if (p.K <= 128)
      return launch_early(call, attend_split<128, KV>, grid, kThreads, Ring<128, KV>::kBytes, a, p);
  }
  launch_early(call, attend_plain<T, KV>, dim3(p.splits, Hq, S), kThreads, 0, a, p);
}

void launch_attention_decode(const AttentionDecodeArgs& a, const CudaCall& call) {
  require_grid("attention_decode", "lengths", a.lengths);
  require_aligned("attention_decode", "q", a.q);
  require_aligned("attention_decode", "k_pages", a.k_pages);
  require_aligned("attention_decode", "v_pages", a.v_pages);
  Plan p = make_plan(a, call);
  if (p.K > kMostHead)
    throw std::invalid_argument(
        "attention_decode: k_pages must have a head size of at most 256, got " +
        a.k_pages.describe());
  if (p.splits > 1) p.partial = reinterpret_cast<float*>(call.workspace);
  const unsigned S = static_cast<unsigned>(a.q.shape[0]), Hq = p.Hkv * p.group;
  const bool q16 = a.q.dtype == DType::bf16, codes = a.k_pages.dtype == DType::u8;
  if (q16)
    codes ? launch_typed<bf16, e4m3>(a, p, call) : launch_typed<bf16, bf16>(a, p, call);
  else
    codes ? launch_typed<float, e4m3>(a, p, call) : launch_typed<float, float>(a, p, call);
  if (p.splits > 1)
    launch_early(call, q16 ? join<bf16> : join<float>, dim3(Hq, S), kThreads, 0, a, p);
}

const RegisterCuda<AttentionDecodeArgs, launch_attention_decode, workspace_bytes> registered(
    "attention_decode");

}  // namespace
}  // namespace ei::cuda
