// Computes: sample (sample.h), the same ids as the CPU from the same logits: the random words are
//   the same, and whatever a choice turns on is compared exactly.
// Layout: z = (logit - max) / temperature is computed again in every pass over the row; it stays in
//   the second-level cache. "Key": 32 bits that sort like z, then (for ties) the inverted id.
// Work split: one block per row. Passes: maximum; for top_k a search of the k-th largest key, 8
// bits at a
//   time from a histogram of counts; for top_p the same with a histogram of probabilities, and on
//   into the ids; then the draw. No sorting.
// Order: probabilities are added as whole multiples of 2^-40, so their order cannot matter (integer
//   atomics in shared memory). The draw compares Gumbel scores in float and settles all that come
//   within their error of the best in double.
// Shared memory: 4 KiB.
// Limits: V < 2^31 and at most 2^23 tokens near the maximum (the sums' range).
// Speed: not yet measured on a GPU. Floor: the logits read once; with top_k or top_p up to 11
// passes. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "sample.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp, kBins = 256;
constexpr float kNone = -INFINITY;

struct Best {
  double score;
  int id;
};
EI_DEVICE bool better(const Best& a, const Best& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

struct Shared {
  uint64_t bins[kBins];
  Best best[kWarps];
  uint64_t above;  // what lies before the chosen bin
  int bin;
};

// The best of all threads, the same in each; a NaN wins over all.
EI_DEVICE Best best_of_block(Best mine, Shared& shared) {
  EI_UNROLL
  for (int step = 0; step < 5; ++step) {
    const int from = (threadIdx.x % kWarp) ^ (1 << step);
    const Best other{shuffle(mine.score, from), shuffle(mine.id, from)};
    if (other.score != other.score || better(other, mine)) mine = other;
  }
  __syncthreads();  // the room may still be read
  if (threadIdx.x % kWarp == 0) shared.best[threadIdx.x / kWarp] = mine;
  __syncthreads();
  mine = shared.best[0];
  for (int w = 1; w < kWarps; ++w) {
    const Best other = shared.best[w];
    if (other.score != other.score || better(other, mine)) mine = other;
  }
  return mine;
}

// A row and the cuts made so far.
struct Row {
  const float* logits;
  int n;
  float top, temperature, min_p;
  uint64_t cut;  // keys below are dropped

  EI_DEVICE float z(int v) const { return (logits[v] - top) / temperature; }
  // z sorts like this number.
  static EI_DEVICE uint32_t order(float z) {
    const uint32_t u = bits_from_float(z);
    return u >> 31 ? ~u : u | 0x80000000u;
  }
  static EI_DEVICE uint64_t key(float z, int v) {
    return static_cast<uint64_t>(order(z)) << 32 | ~static_cast<uint32_t>(v);
  }
  EI_DEVICE bool kept(float z, int v) const {
    return z > kNone && !(min_p > 0.0f && expf(z) < min_p) && key(z, v) >= cut;
  }
};

EI_DEVICE uint64_t share_of(float z) { return static_cast<uint64_t>(expf(z) * 0x1p40f); }

// Adds weight(z) of every kept token whose key begins like `prefix` (its upper `known` bits) to the
// bin of the next 8 bits. Ends with a barrier.
template <class Weight>
EI_DEVICE void histogram(const Row& row, uint64_t prefix, int known, Shared& shared,
                         const Weight& weight) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
  __syncthreads();
  for (int v = threadIdx.x; v < row.n; v += kThreads) {
    const float z = row.z(v);
    if (!row.kept(z, v)) continue;
    const uint64_t key = Row::key(z, v);
    if (known > 0 && (key ^ prefix) >> (64 - known) != 0) continue;
    add_shared(&shared.bins[key >> (56 - known) & 0xff], weight(z));
  }
  __syncthreads();
}

// From the highest bin down, the first at which enough(sum of all bins so far) holds; failing that,
// the last that is not empty. Adds the bins before it to `above`.
template <class Enough>
EI_DEVICE int find_bin(Shared& shared, uint64_t& above, const Enough& enough) {
  if (threadIdx.x == 0) {
    uint64_t before = above, before_last = above;
    int last = 0, chosen = -1;
    for (int b = kBins - 1; b >= 0 && chosen < 0; --b) {
      if (shared.bins[b] == 0) continue;
      last = b;
      before_last = before;
      if (enough(before + shared.bins[b])) chosen = b;
      before += shared.bins[b];
    }
    shared.bin = chosen < 0 ? last : chosen;
    shared.above = before_last;
  }
  __syncthreads();
  above = shared.above;
  return shared.bin;
}

// The key of the k-th largest z among the kept, ids left open (as the smallest key of its z); 0
// where no more than k are kept.
EI_DEVICE uint64_t top_k_cut(const Row& row, uint64_t k, Shared& shared) {
  const auto one = [](float) -> uint64_t { return 1; };
  uint64_t prefix = 0, above = 0;
  for (int known = 0; known < 32; known += 8) {
    histogram(row, prefix, known, shared, one);
    if (known == 0) {
      uint64_t all = 0;
      for (int b = 0; b < kBins; ++b) all += shared.bins[b];
      if (all <= k) return 0;
    }
    const int bin = find_bin(shared, above, [&](uint64_t sum) { return sum >= k; });
    prefix |= static_cast<uint64_t>(bin) << (56 - known);
  }
  return prefix;
}

// The last key, by descending order, before which less than `share` of all probability lies.
EI_DEVICE uint64_t top_p_cut(const Row& row, float share, Shared& shared) {
  uint64_t prefix = 0, above = 0;
  double target = 0.0;
  for (int known = 0; known < 64; known += 8) {
    histogram(row, prefix, known, shared, share_of);
    if (known == 0) {
      uint64_t all = 0;
      for (int b = 0; b < kBins; ++b) all += shared.bins[b];
      target = static_cast<double>(all) * share;
    }
    const int bin =
        find_bin(shared, above, [&](uint64_t sum) { return static_cast<double>(sum) >= target; });
    prefix |= static_cast<uint64_t>(bin) << (56 - known);
  }
  return prefix;
}

// Four random words: Philox4x32-10.
EI_DEVICE void random_words(uint32_t counter, uint64_t position, uint64_t seed, uint32_t (&w)[4]) {
  w[0] = counter;
  w[1] = static_cast<uint32_t>(position);
  w[2] = static_cast<uint32_t>(position >> 32);
  w[3] = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  EI_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xd2511f53u} * w[0], q = uint64_t{0xcd9e8d57u} * w[2];
    w[0] = static_cast<uint32_t>(q >> 32) ^ w[1] ^ k0;
    w[1] = static_cast<uint32_t>(q);
    w[2] = static_cast<uint32_t>(p >> 32) ^ w[3] ^ k1;
    w[3] = static_cast<uint32_t>(p);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

EI_DEVICE double exact_score(float z, uint32_t word) {
  const double u = (word + 0.5) * 0x1p-32;
  return z - log(-log1p(-u));
}
// The same in float. log(1 - u) is taken from whichever of u and 1 - u is small, so the error stays
// below kScoreError times the score's size.
constexpr float kScoreError = 1e-5f;
EI_DEVICE float rough_score(float z, uint32_t word) {
  const float low = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  const float high = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;
  return z - logf(word >> 31 ? -logf(high) : -log1pf(-low));
}

EI_DEVICE Best draw(const Row& row, uint64_t seed, uint64_t position) {
  Best best{-INFINITY, INT32_MAX};
  for (int first = 4 * threadIdx.x; first < row.n; first += 4 * kThreads) {
    uint32_t words[4];
    bool made = false;
    EI_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (first + i >= row.n) break;
      const float z = row.z(first + i);
      if (!row.kept(z, first + i)) continue;
      if (!made) random_words(first / 4, position, seed, words);
      made = true;
      const float rough = rough_score(z, words[i]);
      if (rough + kScoreError * (fabsf(rough) + fabsf(z) + 1.0f) < best.score) continue;
      const Best mine{exact_score(z, words[i]), first + i};
      if (better(mine, best)) best = mine;
    }
  }
  return best;
}

__global__ void __launch_bounds__(kThreads) choose(const __grid_constant__ SampleArgs a) {
  begin_kernel();
  EI_SHARED(Shared, shared);
  const int64_t r = blockIdx.x;
  Row row{cuda::row<float>(a.logits, r),
          static_cast<int>(a.logits.shape[1]),
          0.0f,
          a.temperature.ptr<float>()[r],
          a.min_p.ptr<float>()[r],
          0};
  Best top{-INFINITY, INT32_MAX};
  for (int v = threadIdx.x; v < row.n; v += kThreads) {
    const Best mine{row.logits[v], v};
    if (mine.score != mine.score || better(mine, top)) top = mine;
    if (top.score != top.score) break;
  }
  top = best_of_block(top, shared);
  int32_t& id = a.ids.ptr<int32_t>()[r];
  const bool usable = top.score - top.score == 0.0;  // neither NaN nor infinite
  if (!usable || !(row.temperature > 0.0f)) {
    if (threadIdx.x == 0) id = usable ? top.id : -1;
    return;
  }
  row.top = static_cast<float>(top.score);
  const int k = a.top_k.ptr<int32_t>()[r];
  const float share = a.top_p.ptr<float>()[r];
  if (k > 0 && k < row.n) row.cut = top_k_cut(row, k, shared);
  if (share < 1.0f) row.cut = max(row.cut, top_p_cut(row, share, shared));
  const Best best = best_of_block(draw(row, static_cast<uint64_t>(a.seed.ptr<int64_t>()[r]),
                                       static_cast<uint64_t>(a.position.ptr<int64_t>()[r])),
                                  shared);
  if (threadIdx.x == 0) id = best.id;
}

void launch_sample(const SampleArgs& a, const CudaCall& call) {
  launch_early(call, choose, dim3(static_cast<unsigned>(a.logits.shape[0])), kThreads, 0, a);
}

const RegisterCuda<SampleArgs, launch_sample> registered("sample");

}  // namespace
}  // namespace ei::cuda
