// Matrix product core on tiled weights, shared by matmul, moe_route and moe_matmul.
//
// Weight image on the CPU: tiles of 64 rows (N) x 64 columns (K), [N/64][K/64], each contiguous.
//   bf16 tile: [32 pairs of k][64 rows][2]  (8 KiB): lane = row
//   f32  tile: [64 k][64 rows]              (16 KiB)
// and codes with scales as gemm_codes.h says.
// A Panel points at up to kMaxRows activation rows, where they lie if they can be used as they are;
// tile_row() multiplies them with one row of tiles. Order of summation: within a K tile each
// product is added in ascending k to a sum that starts at zero; the first tile's sum is taken and
// the others are added in ascending order. It does not depend on the number of rows, on their
// widths, or on threads. (With pairs, two products at a time.) NVFP4: the products of 16 columns
// likewise, from zero; then that sum times its block scale is added to the row's, fused. With x as
// int8: gemm_int8.h.
#pragma once
#include "cpu/gemm_int8.h"

namespace ei::EI_ISA {

// Room for the sums of kCodeBlocks blocks, and for one widened tile with its block scales.
struct Totals {
  alignas(64) float sum[kCodeBlocks * kMicroRows * kTile];
  alignas(64) float widened[kTile * kTile];
  alignas(64) float scales[kTile / kScaleBlock * kTile];
};

// Float image of the first n columns of a bf16 tile.
inline void widen_tile(const char* w, int n, float* out) {
  const uint32_t* b = reinterpret_cast<const uint32_t*>(w);
  for (int k = 0; k < n; k += 2)
    for (int j = 0; j < kTile; j += V::kLanes) {
      V even, odd;
      load_pairs(b + (k / 2) * kTile + j, even, odd);
      store(out + k * kTile + j, even);
      store(out + (k + 1) * kTile + j, odd);
    }
}

// One block of rows times K tile t. `scales`: those of an expanded NVFP4 tile, null for all others.
template <Weights W>
inline void block_tile(const RowBlock& block, const char* w, int t, float* totals,
                       const float* scales = nullptr) {
  const int n = std::min(kTile, block.k - t * kTile);
  if (n <= 0) return;
  const char* x[kMicroRows];
  for (int i = 0; i < block.rows; ++i) x[i] = block.x[i] + t * block.step;
  if constexpr (W == Weights::int8)
    micro_bytes_any(block.rows, w, scales, x, n, totals, t == 0);
  else if (scales)
    micro_scaled<W>(block.rows, w, scales, x, n, totals, t == 0);
  else
    micro_any<W>(block.rows, w, x, n, totals, t == 0);
}

// One block of rows times K tile t, straight from the codes.
template <Weights W>
inline void block_codes(const RowBlock& block, const char* tile, int t, float* totals,
                        const Fetch& fetch) {
  const int n = std::min(kTile, block.k - t * kTile);
  if (n <= 0) return;
  const char* x[kMicroRows];
  for (int i = 0; i < block.rows; ++i) x[i] = block.x[i] + t * block.step;
  with_rows(block.rows, [&](auto count) {
    if constexpr (W == Weights::int8)
      micro_int8<count>(tile, x, n, totals, t == 0, fetch);
    else
      micro_codes<count, W>(tile, x, n, totals, t == 0, fetch);
  });
}

// One row of tiles of an image, and where the tiles end that the caller goes on to read.
struct ImageRow {
  const char *tiles, *end;
};

// The blocks [first, end) times one row of tiles.
template <Weights W, DType Tile>
inline void tile_row_as(const Panel& p, int first, int end, const ImageRow& row, Totals& totals) {
  constexpr int sums = kMicroRows * kTile;
  // What a tile that several blocks share is expanded to.
  constexpr Weights expanded = W == Weights::widen ? Weights::f32 : W;
  constexpr bool nvfp4 = Tile == DType::nvfp4;
  const bool alone = end - first == 1;
  const bool expand = Tile == DType::fp8 || (!alone && (nvfp4 || W == Weights::widen));
  char* image = reinterpret_cast<char*>(totals.widened);
  int k = 0;
  for (int b = first; b < end; ++b) k = std::max(k, p.block[b].k);
  const int tiles_read = static_cast<int>(tiles(k));
  const auto ahead = [&](int t, int distance) {
    return tile_ahead(row.tiles, p.row_bytes, t, distance, tiles_read, tile_bytes(Tile), row.end);
  };
  for (int t = 0; t < tiles_read; ++t) {
    const char* w = row.tiles + t * tile_bytes(Tile);
    const int n = std::min(kTile, k - t * kTile);
    if constexpr (W == Weights::int8) {
      if (expand) expand_bytes(w, n, image, totals.scales);
    } else if constexpr (quantised(Tile)) {
      if (expand) expand_tile<expanded, Tile>(w, n, image, totals.scales);
    } else {
      if (expand) widen_tile(w, n, totals.widened);
    }
    for (int b = first; b < end; ++b) {
      float* out = totals.sum + (b - first) * sums;
      if (expand)
        block_tile<expanded>(p.block[b], image, t, out, nvfp4 ? totals.scales : nullptr);
      else if constexpr (nvfp4)
        block_codes<W>(p.block[b], w, t, out, Fetch{ahead(t, kNear<W>), ahead(t, kFar<W>)});
      else if constexpr (Tile != DType::fp8)
        block_tile<W>(p.block[b], w, t, out);
    }
  }
  for (int b = first; b < end; ++b)
    if (p.block[b].k == 0) std::memset(totals.sum + (b - first) * sums, 0, sums * 4);
}

template <DType Tile>
inline void tile_row_of(const Panel& p, int first, int end, const ImageRow& row, Totals& totals) {
  if constexpr (Tile == DType::nvfp4)
    if (p.kind == Weights::int8)
      return tile_row_as<Weights::int8, Tile>(p, first, end, row, totals);
  if constexpr (V::kPairs)
    if (p.kind == Weights::pairs)
      return tile_row_as<Weights::pairs, Tile>(p, first, end, row, totals);
  tile_row_as<Weights::widen, Tile>(p, first, end, row, totals);
}

// Calls out(row, sums) for every row of the panel with its 64 sums over one row of weight tiles,
// times `scale` where tiles are quantised.
template <class Out>
inline void tile_row(const Panel& p, const ImageRow& row, Totals& totals, Out out,
                     float scale = 1.0f) {
  const float lacks = p.kind == Weights::int8 ? kScaleFactor : kBlockFactor;
  const V factor = V::set(p.tile == DType::nvfp4 ? scale * lacks : scale);
  const int together = quantised(p.tile) ? kCodeBlocks : kBlocks;
  for (int first = 0; first < p.blocks; first += together) {
    const int end = std::min(first + together, p.blocks);
    switch (p.tile) {
      case DType::f32: tile_row_as<Weights::f32, DType::f32>(p, first, end, row, totals); break;
      case DType::fp8: tile_row_of<DType::fp8>(p, first, end, row, totals); break;
      case DType::nvfp4: tile_row_of<DType::nvfp4>(p, first, end, row, totals); break;
      default: tile_row_of<DType::bf16>(p, first, end, row, totals);
    }
    const int rows = std::min(p.rows, end * kMicroRows);
    for (int r = first * kMicroRows; r < rows; ++r) {
      float* sums = totals.sum + (r - first * kMicroRows) * kTile;
      if (quantised(p.tile))
        for (int c = 0; c < kTile; c += V::kLanes) store(sums + c, mul(V::load(sums + c), factor));
      out(r, sums);
    }
  }
}

}  // namespace ei::EI_ISA
