// Computes: moe_matmul (moe_matmul.h).
// Layout: entries (row, choice) sorted by expert; the rows of one expert are gathered into a panel
//   (gemm.h), so its weights are read once per 256 of its rows.
// Work split: sort on the caller; then three rounds: ranges of the up tile rows of all experts that
//   have entries, of their down tile rows, and rows to combine.
//   With x as int8: x is quantised once, and each part of the up products what it gives.
// Order: products as in gemm.h; the sum over a row's experts ascends by expert.
// Limits: D, F and their prefixes are multiples of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "moe_matmul.h"

#include "cpu/gemm.h"
#include "host/index.h"
#include "host/pool.h"

namespace ei::EI_ISA {
namespace {

// The arguments with the workspace's parts and the sizes that every phase needs.
struct Moe {
  const MoeMatmulArgs& a;
  int R, J, E, D, F, active = 0;
  int32_t *entry, *order, *begin, *cursor, *experts, *k_of, *f_of;
  char *middle, *result;

  explicit Moe(const MoeMatmulArgs& args) : a(args) {
    R = static_cast<int>(a.x.shape[0]);
    J = static_cast<int>(a.ids.shape[1]);
    E = static_cast<int>(a.up.shape[0]);
    D = static_cast<int>(a.x.shape[1]);
    F = static_cast<int>(a.F);
    const MoeWorkspace w = moe_workspace(R, J, E, D, F, dtype_size(a.x.dtype));
    char* base = a.workspace.ptr<char>();
    entry = reinterpret_cast<int32_t*>(base + w.entry);
    order = reinterpret_cast<int32_t*>(base + w.order);
    begin = reinterpret_cast<int32_t*>(base + w.begin);
    cursor = reinterpret_cast<int32_t*>(base + w.cursor);
    experts = reinterpret_cast<int32_t*>(base + w.active);
    k_of = reinterpret_cast<int32_t*>(base + w.k);
    f_of = reinterpret_cast<int32_t*>(base + w.f);
    middle = base + w.middle;
    result = base + w.result;
  }
  int k(int row) const { return k_of[row]; }
  int f(int row) const { return f_of[row]; }
};

// Looks up the active sizes of all rows. False when one is out of range.
bool find_sizes(Moe& m, Pool& pool) {
  const Tensor& rows = m.a.row_width;
  const ActiveSizes k{"moe_matmul", rows, "row_width", m.a.k_sizes, "k_sizes", m.D, 16};
  const ActiveSizes f{"moe_matmul", rows, "row_width", m.a.f_sizes, "f_sizes", m.F, 16};
  for (int r = 0; r < m.R; ++r) {
    m.k_of[r] = k.at(pool, r);
    m.f_of[r] = f.at(pool, r);
    if (m.k_of[r] < 0 || m.f_of[r] < 0) return false;
  }
  return true;
}

// Counting sort of the entries by expert. Each id is read once; until entries have their places,
// the room for `order` keeps it. False when one is out of range.
bool sort_entries(Moe& m, Pool& pool) {
  std::memset(m.begin, 0, (m.E + 1) * sizeof(int32_t));
  for (int r = 0; r < m.R; ++r)
    for (int j = 0; j < m.J; ++j) {
      const int32_t id = read_once(m.a.ids, r * m.a.ids.stride[0] + j);
      if (id < 0 || id >= m.E) {
        pool.fail("moe_matmul: ids must hold experts in [0, " + std::to_string(m.E) + "), got " +
                  std::to_string(id) + " at row " + std::to_string(r));
        return false;
      }
      m.order[r * m.J + j] = id;
      ++m.begin[id + 1];
    }
  for (int e = 0; e < m.E; ++e) {
    if (m.begin[e + 1] > 0) m.experts[m.active++] = e;
    m.begin[e + 1] += m.begin[e];
    m.cursor[e] = m.begin[e];
  }
  for (int i = 0; i < m.R * m.J; ++i) m.entry[m.cursor[m.order[i]]++] = i;
  std::memset(m.cursor, 0, m.R * sizeof(int32_t));
  for (int p = 0; p < m.R * m.J; ++p) {
    const int r = m.entry[p] / m.J;
    m.order[r * m.J + m.cursor[r]++] = p;
  }
  return true;
}

// Both directions differ in where rows come from and go to, and in the activation.
enum class Phase { up, down };

template <class X>
void activate(const float* sums, X* out, int n) {
  const V zero = V::set(0.0f);
  for (int c = 0; c < n; c += V::kLanes) {
    X projected[V::kLanes];  // rounded before the activation
    store(projected, V::load(sums + c));
    const V v = max(zero, V::load(projected));  // in this order a NaN stays one
    store(out + c, mul(v, v));
  }
}

// Where the up products of one tile go: as they are, or as int8 tile `t` of the entry's row.
template <class X>
void store_up(const Moe& m, const float* sums, int64_t entry, int t, int n) {
  if (!m.a.int8) return activate(sums, reinterpret_cast<X*>(m.middle) + entry * m.F + t * kTile, n);
  X values[kTile];
  activate(sums, values, n);
  quantise_tile(values, n, reinterpret_cast<Int8Tile*>(m.middle)[entry * tiles(m.F) + t]);
}

// The rows of one expert from entry `at` on, as they are multiplied.
template <class X, Phase P, class Source>
void fill(Panel& panel, const Moe& m, Pool& pool, int thread, int at, int rows, Source source) {
  constexpr bool up = P == Phase::up;
  const auto k = [&](int i) { return up ? m.k(source(i)) : m.f(source(i)); };
  if (m.a.int8) {
    const auto* tile = reinterpret_cast<const Int8Tile*>(up ? m.result : m.middle);
    return fill_int8_panel(
        panel, rows,
        [&](int i) { return tile + (up ? source(i) : at + i) * tiles(up ? m.D : m.F); }, k);
  }
  const auto row = [&](int i) {
    return up ? m.a.x.ptr<X>() + source(i) * m.a.x.stride[0]
              : reinterpret_cast<const X*>(m.middle) + static_cast<int64_t>(at + i) * m.F;
  };
  fill_panel<X>(panel, m.a.w_dtype, rows, pool.scratch(thread), row, k, Alone());
}

// One expert, tile rows [first, end), all of its rows.
template <class X, Phase P>
void run_expert(const Moe& m, Pool& pool, int thread, int expert, int first, int end) {
  constexpr bool up = P == Phase::up;
  const int in = up ? m.D : m.F, out_size = up ? m.F : m.D;
  const int64_t row_bytes = tiles(in) * tile_bytes(m.a.w_dtype);
  const char* image = (up ? m.a.up : m.a.down).ptr<char>() + expert * tiles(out_size) * row_bytes;
  const Tensor& scales = up ? m.a.up_scale : m.a.down_scale;
  const float scale = scales ? scales.ptr<float>()[expert] : 1.0f;
  Totals totals;
  for (int at = m.begin[expert]; at < m.begin[expert + 1]; at += kMaxRows) {
    const int rows = std::min(kMaxRows, m.begin[expert + 1] - at);
    const auto source = [&](int i) { return m.entry[at + i] / m.J; };
    const auto wanted = [&](int i) { return up ? m.f(source(i)) : m.k(source(i)); };
    int widest = 0;
    for (int i = 0; i < rows; ++i) widest = std::max(widest, wanted(i));
    if (first * kTile >= widest) continue;
    Panel panel;
    fill<X, P>(panel, m, pool, thread, at, rows, source);
    panel.row_bytes = row_bytes;
    X* out = reinterpret_cast<X*>(m.result) + static_cast<int64_t>(at) * out_size;
    const int last = std::min<int>(end, static_cast<int>(tiles(widest)));
    for (int t = first; t < last; ++t)
      tile_row(
          panel, {image + t * row_bytes, image + last * row_bytes}, totals,
          [&](int i, const float* sums) {
            const int n = std::clamp(wanted(i) - t * kTile, 0, kTile);
            if (up) return store_up<X>(m, sums, at + i, t, n);
            store_sums(sums, out + static_cast<int64_t>(i) * out_size + t * kTile, n);
          },
          scale);
  }
}

template <class X, Phase P>
void run_phase(const Moe& m, Pool& pool) {
  const int tile_rows = static_cast<int>(tiles(P == Phase::up ? m.F : m.D));
  pool.run_ranges(int64_t{m.active} * tile_rows, [&](int64_t begin, int64_t end, int thread) {
    while (begin < end) {
      const int first = static_cast<int>(begin % tile_rows);
      const int last = static_cast<int>(std::min<int64_t>(tile_rows, first + end - begin));
      run_expert<X, P>(m, pool, thread, m.experts[begin / tile_rows], first, last);
      begin += last - first;
    }
  });
}

template <class X>
void combine_row(const Moe& m, int r) {
  const int n = m.k(r);
  X* out = m.a.out.ptr<X>() + r * m.a.out.stride[0];
  const X* shared = m.a.shared ? m.a.shared.ptr<X>() + r * m.a.shared.stride[0] : nullptr;
  const float* weights = m.a.weights.ptr<float>() + r * m.a.weights.stride[0];
  for (int c = 0; c < n; c += V::kLanes) {
    V total = V::set(0.0f);
    for (int i = 0; i < m.J; ++i) {
      const int p = m.order[r * m.J + i];
      const X* from = reinterpret_cast<const X*>(m.result) + static_cast<int64_t>(p) * m.D + c;
      total = add(total, mul(V::load(from), V::set(weights[m.entry[p] - r * m.J])));
    }
    if (shared) total = add(total, V::load(shared + c));
    store(out + c, total);
  }
  std::memset(static_cast<void*>(out + n), 0, (m.D - n) * sizeof(X));
}

template <class F>
void for_rows(const Moe& m, Pool& pool, F f) {
  constexpr int kRows = 8;
  pool.run((m.R + kRows - 1) / kRows, [&](int64_t part, int) {
    const int first = static_cast<int>(part) * kRows;
    for (int r = first; r < std::min(m.R, first + kRows); ++r) f(r);
  });
}

template <class X>
void run_all(Moe& m, Pool& pool) {
  const int64_t count = tiles(m.D);
  if (m.a.int8)
    for_rows(m, pool, [&](int r) {
      quantise_row(m.a.x.ptr<X>() + r * m.a.x.stride[0], m.k(r),
                   reinterpret_cast<Int8Tile*>(m.result) + r * count, count);
    });
  run_phase<X, Phase::up>(m, pool);
  run_phase<X, Phase::down>(m, pool);
  for_rows(m, pool, [&](int r) { combine_row<X>(m, r); });
}

}  // namespace

void moe_matmul(const MoeMatmulArgs& a, Pool& pool) {
  Moe m(a);
  if (m.R * m.J == 0 || !find_sizes(m, pool) || !sort_entries(m, pool)) return;
  a.x.dtype == DType::bf16 ? run_all<bf16>(m, pool) : run_all<float>(m, pool);
}

}  // namespace ei::EI_ISA
