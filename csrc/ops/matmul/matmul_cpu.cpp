// Computes: matmul and matmul_pack (matmul.h).
// Layout: weights in 64x64 tiles, lane = weight row; activations where they lie, or copied once per
//   call into [block of 6 rows][K/64][row][64] (gemm.h).
// Work split: ranges of weight tile rows; 24 activation rows at a time pass over a tile
//   while it is in the first-level cache, and weights are read from memory once per 256 rows.
// Scratch: the panel, or x as int8, in that of the first thread.
// Limits: k sizes are multiples of 16.
// Speed: see the op table in the README (bench/ops.py).
#include "matmul.h"

#include "cpu/gemm.h"
#include "host/index.h"

namespace ei::EI_ISA {
namespace {

// Output columns of one tile row, and how many of them each width wants.
struct TileRow {
  int segment, first, columns;  // first: row inside the segment; columns: <= 64
};

TileRow locate(const MatmulArgs& a, int tile) {
  for (int s = 0;; ++s) {
    const int in_segment = tile - static_cast<int>(tiles(a.rows[s]));
    if (in_segment < 0) return {s, tile * kTile, std::min(kTile, a.rows[s] - tile * kTile)};
    tile = in_segment;
  }
}

template <class X, class O>
void write_row(Activation activation, float* sums, O* out, int wanted, int columns) {
  if (activation == Activation::relu2) {
    // As two rounded steps of the working type: the projection, then relu squared.
    const V zero = V::set(0.0f);
    for (int c = 0; c < kTile; c += V::kLanes) {
      X projected[V::kLanes];
      store(projected, V::load(sums + c));
      const V v = max(zero, V::load(projected));  // in this order a NaN stays one
      store(sums + c, mul(v, v));
    }
  }
  store_sums(sums, out, wanted);
  std::memset(static_cast<void*>(out + wanted), 0, (columns - wanted) * sizeof(O));
}

// What a block's rows use: columns of x, and outputs by segment (null: all of them).
struct Active {
  int k[kMaxRows];
  const int32_t* n[kMaxRows];

  // False when a row's width or a size is out of range.
  bool find(const MatmulArgs& a, Pool& pool, int64_t first_row, int rows) {
    const ActiveSizes sizes{"matmul",  a.row_width,  "row_width", a.k_sizes,
                            "k_sizes", a.x.shape[1], 16};
    for (int r = 0; r < rows; ++r) {
      n[r] = nullptr;
      if ((k[r] = sizes.at(pool, first_row + r)) < 0) return false;
      if (!a.row_width) continue;
      const int32_t width = read_once(a.row_width, first_row + r);
      if (!inside(pool, "matmul", "row_width", width, 0, a.n_sizes.shape[0] - 1, "row",
                  first_row + r))
        return false;
      n[r] = a.n_sizes.ptr<int32_t>() + static_cast<int64_t>(width) * a.segments;
      for (int s = 0; s < a.segments; ++s)
        if (!inside(pool, "matmul", "n_sizes", n[r][s], 0, a.rows[s], "row", first_row + r))
          return false;
    }
    return true;
  }
};

template <class X, class O>
void run_block(const MatmulArgs& a, Pool& pool, int64_t first_row, int rows) {
  const int64_t K = a.x.shape[1], row_bytes = a.w.shape[1] * tile_bytes(a.w_dtype);
  Active active;
  if (!active.find(a, pool, first_row, rows)) return;
  int total_tiles = 0;
  for (int s = 0; s < a.segments; ++s) total_tiles += static_cast<int>(tiles(a.rows[s]));
  Panel panel;
  const auto source = [&](int r) { return a.x.ptr<X>() + (first_row + r) * a.x.stride[0]; };
  const auto k = [&](int r) { return active.k[r]; };
  const auto share = [&](int64_t n, const auto& f) { pool.run(n, f); };
  if (a.int8) {
    Int8Tile* coded = reinterpret_cast<Int8Tile*>(pool.scratch(0));
    const int64_t count = tiles(K);
    share(rows, [&](int64_t r, int = 0) {
      quantise_row(source(static_cast<int>(r)), k(static_cast<int>(r)), coded + r * count, count);
    });
    fill_int8_panel(panel, rows, [&](int r) { return coded + r * count; }, k);
  } else {
    fill_panel<X>(panel, a.w_dtype, rows, pool.scratch(0), source, k, share);
  }
  panel.row_bytes = row_bytes;
  pool.run_ranges(total_tiles, [&](int64_t begin, int64_t range_end, int) {
    const int end = static_cast<int>(range_end);
    Totals totals;
    for (int tile = static_cast<int>(begin); tile < end; ++tile) {
      const TileRow t = locate(a, tile);
      const auto wanted = [&](int r) {
        const int n = active.n[r] ? active.n[r][t.segment] : a.rows[t.segment];
        return std::clamp(n, t.first, t.first + t.columns) - t.first;
      };
      const auto write = [&](int r, float* sums) {
        O* out = a.out.ptr<O>() + (first_row + r) * a.out.stride[0] + a.column[t.segment] + t.first;
        write_row<X>(a.activation, sums, out, wanted(r), t.columns);
      };
      int widest = 0;
      for (int r = 0; r < rows; ++r) widest = std::max(widest, wanted(r));
      const int64_t row = a.tile_row[t.segment] + t.first / kTile;
      const int in_segment = static_cast<int>(tiles(a.rows[t.segment])) - t.first / kTile;
      const char* image = a.w.ptr<char>() + row * row_bytes;
      if (widest > 0)
        tile_row(panel, {image, image + std::min(end - tile, in_segment) * row_bytes}, totals,
                 write, a.scale ? a.scale.ptr<float>()[t.segment] : 1.0f);
      else
        for (int r = 0; r < rows; ++r) {
          O* out =
              a.out.ptr<O>() + (first_row + r) * a.out.stride[0] + a.column[t.segment] + t.first;
          std::memset(static_cast<void*>(out), 0, t.columns * sizeof(O));
        }
    }
  });
}

template <class X, class O>
void run_all(const MatmulArgs& a, Pool& pool) {
  for (int64_t r = 0; r < a.x.shape[0]; r += kMaxRows)
    run_block<X, O>(a, pool, r, static_cast<int>(std::min<int64_t>(kMaxRows, a.x.shape[0] - r)));
}

template <class S>
void pack_tile(const S* rows, int64_t stride, int n, int k, DType to, char* tile) {
  std::memset(tile, 0, tile_bytes(to));
  for (int r = 0; r < n; ++r)
    for (int c = 0; c < k; ++c) {
      const float v = to_float(rows[r * stride + c]);
      if (to == DType::f32)
        reinterpret_cast<float*>(tile)[c * kTile + r] = v;
      else
        from_float(v, reinterpret_cast<bf16*>(tile)[(c / 2 * kTile + r) * 2 + c % 2]);
    }
}

// Codes and block scales of n rows of k columns, as gemm_codes.h lays them out.
void pack_codes(const uint8_t* codes, int64_t stride, const uint8_t* scales, int64_t scale_stride,
                int n, int k, char* tile) {
  const bool nvfp4 = scales != nullptr;
  std::memset(tile, 0, tile_bytes(nvfp4 ? DType::nvfp4 : DType::fp8));
  uint32_t* words = reinterpret_cast<uint32_t*>(tile);
  for (int r = 0; r < n; ++r)
    for (int c = 0; c < k; ++c) {
      if (nvfp4) {
        const uint32_t code = codes[r * stride + c / 2] >> (c % 2 * 4) & 15;
        *const_cast<uint32_t*>(nvfp4_word(tile, c, r)) |= code << nvfp4_shift(c % kNvfp4Group);
      } else {
        const uint32_t code = codes[r * stride + c];
        words[c / kFp8Group * kTile + r] |= code << fp8_shift(c % kFp8Group);
      }
    }
  if (!nvfp4) return;
  for (int r = 0; r < n; ++r)
    for (int c = 0; c < k; c += kScaleBlock)
      *const_cast<uint8_t*>(nvfp4_scale(tile, c, r)) = scales[r * scale_stride + c / kScaleBlock];
}

// Calls f(row of tiles, column of tiles, tile, rows, columns) for all tiles that the source's
// K columns and those beyond touch.
template <class F>
void for_tiles(const PackArgs& a, int64_t K, Pool& pool, F f) {
  const int64_t N = a.source.shape[0];
  const int64_t image_tiles = a.image.shape[1], bytes = tile_bytes(a.w_dtype);
  pool.run(tiles(N), [&](int64_t t, int) {
    for (int64_t c = 0; c < image_tiles; ++c) {
      char* tile = a.image.ptr<char>() + ((a.tile_row + t) * image_tiles + c) * bytes;
      const int64_t k = std::clamp<int64_t>(K - c * kTile, 0, kTile);
      f(t, c, tile, static_cast<int>(std::min<int64_t>(kTile, N - t * kTile)), static_cast<int>(k));
    }
  });
}

template <class S>
void pack(const PackArgs& a, Pool& pool) {
  const int64_t stride = a.source.stride[0];
  for_tiles(a, a.source.shape[1], pool, [&](int64_t t, int64_t c, char* tile, int n, int k) {
    pack_tile(a.source.ptr<S>() + t * kTile * stride + c * kTile, stride, n, k, a.w_dtype, tile);
  });
}

void pack_quantised(const PackArgs& a, Pool& pool) {
  const bool nvfp4 = a.w_dtype == DType::nvfp4;
  const int64_t stride = a.source.stride[0], per_byte = nvfp4 ? 2 : 1;
  const int64_t scale_stride = a.block_scales.stride[0];
  for_tiles(a, a.source.shape[1] * per_byte, pool,
            [&](int64_t t, int64_t c, char* tile, int n, int k) {
              const uint8_t* scales = a.block_scales.ptr<uint8_t>();
              if (nvfp4) scales += t * kTile * scale_stride + c * kTile / kScaleBlock;
              const int64_t at = t * kTile * stride + c * kTile / per_byte;
              pack_codes(a.source.ptr<uint8_t>() + at, stride, scales, scale_stride, n, k, tile);
            });
}

}  // namespace

void matmul(const MatmulArgs& a, Pool& pool) {
  const bool x16 = a.x.dtype == DType::bf16, o16 = a.out.dtype == DType::bf16;
  if (x16 && o16) return run_all<bf16, bf16>(a, pool);
  if (x16) return run_all<bf16, float>(a, pool);
  if (o16) return run_all<float, bf16>(a, pool);
  run_all<float, float>(a, pool);
}

void matmul_pack(const PackArgs& a, Pool& pool) {
  if (quantised(a.w_dtype)) return pack_quantised(a, pool);
  a.source.dtype == DType::bf16 ? pack<bf16>(a, pool) : pack<float>(a, pool);
}

}  // namespace ei::EI_ISA
