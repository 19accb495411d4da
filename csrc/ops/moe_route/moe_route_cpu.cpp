// Computes: moe_route (moe_route.h).
// Layout: gate in float32 tiles, lane = expert; the scores of a block of rows stay in scratch.
// Work split: parts are blocks of up to 32 rows; of a single block, the tile rows of the gate.
// Order: logits as in gemm.h; the chosen scores are summed in descending order of selection.
// Limits: D and k sizes are multiples of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "moe_route.h"

#include "cpu/gemm.h"
#include "host/index.h"
#include "host/pool.h"

namespace ei::EI_ISA {
namespace {

constexpr int kRows = 32;

// Chooses J of the first n experts. `score` [n] is the sigmoid; `select` [n] is overwritten.
void choose(const float* score, float* select, const float* bias, int n, int J, float scaling,
            int32_t* ids, float* weights) {
  // A score that is not a number is never preferred, but its weight shows it.
  for (int e = 0; e < n; ++e) {
    const float s = score[e] + bias[e];
    select[e] = s == s ? s : -INFINITY;
  }
  float total = 0.0f;
  for (int j = 0; j < J; ++j) {
    int best = -1;
    for (int e = 0; e < n; ++e) {
      if (best >= 0 && !(select[e] > select[best])) continue;
      if (std::find(ids, ids + j, e) == ids + j) best = e;
    }
    ids[j] = best;
    select[best] = -INFINITY;
    total += score[best];
  }
  for (int j = 0; j < J; ++j) weights[j] = score[ids[j]] / (total + 1e-20f) * scaling;
}

// share(n, f) calls f(t, ...) for t in [0, n): on this thread, or on all.
template <class X, class Share>
void route_block(const MoeRouteArgs& a, Pool& pool, int thread, int64_t first, int rows,
                 const Share& share) {
  const int64_t D = a.x.shape[1], E = a.bias.shape[0];
  const int J = static_cast<int>(a.ids.shape[1]);
  const int64_t padded = tiles(E) * kTile;
  const ActiveSizes k{"moe_route", a.row_width, "row_width", a.k_sizes, "k_sizes", D, 16};
  const ActiveSizes experts{"moe_route", a.row_width, "row_width", a.e_sizes, "e_sizes", E};
  int columns[kRows];
  for (int r = 0; r < rows; ++r)
    if ((columns[r] = k.at(pool, first + r)) < 0) return;
  float* score = reinterpret_cast<float*>(pool.scratch(thread));
  float* select = score + rows * padded;
  Panel panel;
  fill_panel<X>(
      panel, DType::f32, rows, reinterpret_cast<char*>(select + padded),
      [&](int r) { return a.x.ptr<X>() + (first + r) * a.x.stride[0]; },
      [&](int r) { return columns[r]; }, Alone());
  const V one = V::set(1.0f), zero = V::set(0.0f);
  share(tiles(E), [&](int64_t t, int = 0) {
    Totals totals;
    const int64_t row_bytes = a.gate.shape[1] * tile_bytes(DType::f32);
    const char* image_row = a.gate.ptr<char>() + t * row_bytes;
    tile_row(panel, {image_row, image_row + row_bytes}, totals, [&](int r, const float* sums) {
      for (int c = 0; c < kTile; c += V::kLanes)
        store(score + r * padded + t * kTile + c,
              div(one, add(one, exp(sub(zero, V::load(sums + c))))));
    });
  });
  for (int r = 0; r < rows; ++r) {
    const int n = experts.at(pool, first + r);
    if (n < 0) return;
    if (n < J) {
      pool.fail("moe_route: e_sizes must keep at least J = " + std::to_string(J) +
                " experts, got " + std::to_string(n) + " at row " + std::to_string(first + r));
      return;
    }
    choose(score + r * padded, select, a.bias.ptr<float>(), n, J, a.scaling_factor,
           a.ids.ptr<int32_t>() + (first + r) * a.ids.stride[0],
           a.weights.ptr<float>() + (first + r) * a.weights.stride[0]);
  }
}

template <class X>
void run_all(const MoeRouteArgs& a, Pool& pool) {
  const int64_t R = a.x.shape[0];
  if (R <= kRows)
    return route_block<X>(a, pool, 0, 0, static_cast<int>(R),
                          [&](int64_t n, const auto& f) { pool.run(n, f); });
  pool.run((R + kRows - 1) / kRows, [&](int64_t part, int thread) {
    const int64_t first = part * kRows;
    const int rows = static_cast<int>(std::min<int64_t>(kRows, R - first));
    route_block<X>(a, pool, thread, first, rows, Alone());
  });
}

}  // namespace

void moe_route(const MoeRouteArgs& a, Pool& pool) {
  a.x.dtype == DType::bf16 ? run_all<bf16>(a, pool) : run_all<float>(a, pool);
}

}  // namespace ei::EI_ISA
