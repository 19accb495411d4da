// Computes: sample (sample.h).
// Layout: a row's z in scratch, filled up with -inf; for top_k and top_p a copy of what is kept as
//   64-bit keys that sort by descending z, then ascending id.
// Work split: parts are rows.
// Order: probabilities are summed in float within 64 tokens, in double beyond. Scores are doubles.
//   Random words are made only for blocks of 64 tokens that can still win, and the exact score only
//   for tokens that a cheap bound cannot rule out: neither changes the result.
// Scratch: sample_scratch_bytes(V).
// Limits: V < 2^31.
// Speed: see the op table in the README (bench/ops.py).
#include "sample.h"

#include <functional>
#include <limits>

#include "cpu/vec.h"
#include "host/pool.h"

namespace ei::EI_ISA {
namespace {

constexpr int kBlock = 64;
constexpr float kNone = -std::numeric_limits<float>::infinity();
// The largest value of -log(-log(1 - u)) is log(2^33) = 22.874: no score exceeds its z by more.
constexpr double kMostNoise = 22.9;

// Copies a row into z, filled up with -inf to whole blocks; returns its largest value, NaN if there
// is one in it.
float load_row(const float* logits, int64_t n, float* z) {
  const int64_t padded = (n + kBlock - 1) / kBlock * kBlock;
  std::memcpy(z, logits, n * sizeof(float));
  std::fill(z + n, z + padded, kNone);
  V top = V::set(kNone), nan = V::set(0.0f);
  for (int64_t v = 0; v < padded; v += V::kLanes) {
    const V x = V::load(z + v);
    top = max(x, top);
    nan = propagate_nan(x, nan);
  }
  return max_lane(top) + sum(nan);
}

// Sum of exp over one block.
float block_mass(const float* z) {
  V total = V::set(0.0f);
  for (int i = 0; i < kBlock; i += V::kLanes) total = add(total, exp(V::load(z + i)));
  return sum(total);
}

// z and id as one number: the larger, the earlier by descending z, then ascending id.
uint64_t key_of(float z, int32_t id) {
  uint32_t u;
  std::memcpy(&u, &z, 4);
  u = u >> 31 ? ~u : u | 0x80000000u;
  return static_cast<uint64_t>(u) << 32 | ~static_cast<uint32_t>(id);
}
float key_z(uint64_t key) {
  uint32_t u = static_cast<uint32_t>(key >> 32);
  u = u >> 31 ? u & 0x7fffffffu : ~u;
  float z;
  std::memcpy(&z, &u, 4);
  return z;
}

// Sum of exp(z) over keys.
double mass(const uint64_t* keys, int64_t n) {
  double total = 0;
  float z[kBlock];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t some = std::min<int64_t>(kBlock, n - first);
    for (int64_t i = 0; i < some; ++i) z[i] = key_z(keys[first + i]);
    std::fill(z + some, z + kBlock, kNone);
    total += block_mass(z);
  }
  return total;
}

// The last key, by descending order, before which less than `target` of mass lies. Reorders keys.
uint64_t top_p_cut(uint64_t* keys, int64_t n, double target) {
  const auto descending = std::greater<uint64_t>();
  int64_t low = 0, high = n;  // the cut is in [low, high)
  double above = 0;           // mass before low
  while (high - low > 32) {
    const int64_t middle = low + (high - low) / 2;
    std::nth_element(keys + low, keys + middle, keys + high, descending);
    const double more = mass(keys + low, middle - low);
    if (above + more < target) {
      above += more;
      low = middle;
    } else {
      high = middle;
    }
  }
  std::sort(keys + low, keys + high, descending);
  while (low + 1 < high && (above += mass(keys + low, 1)) < target) ++low;
  return keys[low];
}

// What remains of a row while it is cut.
struct Row {
  float* z;        // [n], n a multiple of kBlock; -inf where dropped
  float* maxima;   // [n / kBlock] largest z of each block
  uint64_t* keys;  // [n] scratch
  int64_t n;

  void find_maxima() const {
    for (int64_t first = 0; first < n; first += kBlock) {
      V top = V::set(kNone);
      for (int i = 0; i < kBlock; i += V::kLanes) top = max(V::load(z + first + i), top);
      maxima[first / kBlock] = max_lane(top);
    }
  }
  // Keys of all tokens with z >= bound that are not dropped; returns how many.
  int64_t gather(float bound) const {
    int64_t kept = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
      if (maxima[first / kBlock] < bound) continue;
      for (int64_t v = first; v < first + kBlock; ++v)
        if (z[v] >= bound && z[v] > kNone) keys[kept++] = key_of(z[v], static_cast<int32_t>(v));
    }
    return kept;
  }
  // A number that at least k tokens reach: the k-th largest of the blocks' maxima.
  float rank_bound(int64_t k) const {
    const int64_t blocks = n / kBlock;
    if (k > blocks) return kNone;
    float* sorted = reinterpret_cast<float*>(keys);
    std::copy(maxima, maxima + blocks, sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + blocks, std::greater<float>());
    return sorted[k - 1];
  }
  double total_mass() const {
    double total = 0;
    for (int64_t first = 0; first < n; first += kBlock) total += block_mass(z + first);
    return total;
  }
  void drop_below(uint64_t cut) const {
    if (cut == 0) return;
    for (int64_t first = 0; first < n; first += kBlock)
      if (maxima[first / kBlock] < key_z(cut))
        std::fill(z + first, z + first + kBlock, kNone);
      else
        for (int64_t v = first; v < first + kBlock; ++v)
          if (key_of(z[v], static_cast<int32_t>(v)) < cut) z[v] = kNone;
  }
};

// z := -inf for every token that min_p, top_k and top_p drop.
void truncate(const Row& row, float min_p, int64_t top_k, float top_p) {
  if (min_p > 0)
    for (int64_t v = 0; v < row.n; v += V::kLanes) {
      const V x = V::load(row.z + v);
      store(row.z + v, select_less(exp(x), V::set(min_p), V::set(kNone), x));
    }
  const bool by_rank = top_k > 0 && top_k < row.n, by_mass = top_p < 1;
  if (!by_rank && !by_mass) return;
  row.find_maxima();
  uint64_t* keys = row.keys;
  int64_t kept = 0;
  uint64_t cut = 0;
  if (by_rank) {
    kept = row.gather(row.rank_bound(top_k));
    if (top_k <= kept) {
      std::nth_element(keys, keys + top_k - 1, keys + kept, std::greater<uint64_t>());
      cut = key_of(key_z(keys[top_k - 1]), INT32_MAX);  // equal ones stay
      kept = std::partition(keys + top_k, keys + kept, [&](uint64_t k) { return k >= cut; }) - keys;
    }
  }
  if (by_mass) {
    const double target = (by_rank ? mass(keys, kept) : row.total_mass()) * top_p;
    // Most rows need only their likeliest tokens sorted out.
    if (!by_rank)
      for (float bound : {-3.0f, -6.0f, -12.0f, kNone}) {
        kept = row.gather(bound);
        if (mass(keys, kept) >= target) break;
      }
    if (kept > 0) cut = top_p_cut(keys, kept, target);
  }
  row.drop_below(cut);
}

// Random words of tokens first .. first + 63: Philox4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", 2011), 16 counters side by side.
void random_words(uint64_t seed, uint64_t position, int64_t first, uint32_t* out) {
  constexpr int L = kBlock / 4;
  constexpr uint64_t kLow = 0xffffffffu;
  uint64_t a[L], b[L], c[L], d[L];  // 32 bits each: the compiler multiplies such lanes at once
  for (int i = 0; i < L; ++i) {
    a[i] = static_cast<uint32_t>(first / 4 + i);
    b[i] = static_cast<uint32_t>(position);
    c[i] = static_cast<uint32_t>(position >> 32);
    d[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < L; ++i) {
      const uint64_t p = 0xd2511f53ull * (a[i] & kLow), q = 0xcd9e8d57ull * (c[i] & kLow);
      a[i] = (q >> 32) ^ b[i] ^ k0;
      b[i] = q & kLow;
      c[i] = (p >> 32) ^ d[i] ^ k1;
      d[i] = p & kLow;
    }
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  for (int i = 0; i < L; ++i) {
    out[4 * i] = static_cast<uint32_t>(a[i]);
    out[4 * i + 1] = static_cast<uint32_t>(b[i]);
    out[4 * i + 2] = static_cast<uint32_t>(c[i]);
    out[4 * i + 3] = static_cast<uint32_t>(d[i]);
  }
}

double score(float z, uint32_t word) {
  const double u = (word + 0.5) * 0x1p-32;
  return z - std::log(-std::log1p(-u));
}

// The token with the largest score; `first_top` has the largest z.
int64_t draw(const float* z, int64_t n, int64_t first_top, uint64_t seed, uint64_t position) {
  uint32_t words[kBlock];
  float bound[kBlock];
  random_words(seed, position, first_top / kBlock * kBlock, words);
  int64_t best = first_top;
  double best_score = score(z[best], words[best % kBlock]);
  for (int64_t first = 0; first < n; first += kBlock) {
    V top = V::set(kNone);
    for (int i = 0; i < kBlock; i += V::kLanes) top = max(V::load(z + first + i), top);
    if (max_lane(top) + kMostNoise < best_score) continue;
    random_words(seed, position, first, words);
    // u <= -log(1 - u), so a token that wins has u <= exp(z - best_score).
    const V against = V::set(static_cast<float>(best_score));
    for (int i = 0; i < kBlock; i += V::kLanes)
      store(bound + i, mul(exp(sub(V::load(z + first + i), against)), V::set(1.001f)));
    for (int i = 0; i < kBlock; ++i) {
      if (static_cast<float>(words[i] >> 8) * 0x1p-24f > bound[i]) continue;
      const double s = score(z[first + i], words[i]);
      if (s > best_score || (s == best_score && first + i < best)) {
        best_score = s;
        best = first + i;
      }
    }
  }
  return best;
}

}  // namespace

void sample(const SampleArgs& a, Pool& pool) {
  const int64_t R = a.logits.shape[0], n = a.logits.shape[1];
  const int64_t padded = (n + kBlock - 1) / kBlock * kBlock;
  pool.run(R, [&](int64_t r, int thread) {
    float* z = reinterpret_cast<float*>(pool.scratch(thread));
    int32_t& id = a.ids.ptr<int32_t>()[r];
    const float top = load_row(a.logits.ptr<float>() + r * a.logits.stride[0], n, z);
    if (!std::isfinite(top)) {
      id = -1;
      return;
    }
    const int64_t first_top = std::find(z, z + n, top) - z;
    const float temperature = a.temperature.ptr<float>()[r];
    if (!(temperature > 0)) {
      id = static_cast<int32_t>(first_top);
      return;
    }
    for (int64_t v = 0; v < padded; v += V::kLanes)
      store(z + v, div(sub(V::load(z + v), V::set(top)), V::set(temperature)));
    auto* keys = reinterpret_cast<uint64_t*>(z + padded);
    truncate({z, reinterpret_cast<float*>(keys + padded), keys, padded}, a.min_p.ptr<float>()[r],
             a.top_k.ptr<int32_t>()[r], a.top_p.ptr<float>()[r]);
    id = static_cast<int32_t>(draw(z, padded, first_top,
                                   static_cast<uint64_t>(a.seed.ptr<int64_t>()[r]),
                                   static_cast<uint64_t>(a.position.ptr<int64_t>()[r])));
  });
}

}  // namespace ei::EI_ISA
