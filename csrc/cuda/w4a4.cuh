// NVFP4 activations times NVFP4 weights: rows of x become E2M1 codes with an E4M3 scale for every
// 16 columns and a float32 scale per row, as nvfp4_quantize makes them (g = amax / (6 * 448) of the
// row's own prefix, found as it is read), and tensor cores multiply codes by codes. Blocks that are
// not finite get a scale that is NaN.
//
// Weights are tiles as all kernels have them (tiles.cuh). A fragment of the instruction wants half
// a block of 16 columns per lane and register where the tile has a quarter, so a lane takes the
// words of two neighbours, and steps 1 and 2 of a tile change places: places 0 to 3 along the
// instruction's 64 columns are steps 0, 2, 1, 3. Codes of x are written in that order: a row has 32
// bytes per K tile, [2 pairs of steps][2 halves][2 steps] words, and four scales. What lies beyond
// the tiles that a row's own prefix reaches into is neither written nor read.
//
// Products have the block shapes of the weight-only kernels (mma_tile.cuh), but warps that split K
// take K tiles in turn. A block's last K tile may be cut: scales beyond the prefix count as zero.
//
// Compute capability 12.x; never run on a GPU. Source: PTX ISA, "Block Scaling for mma.sync";
// ModelOpt's NVFP4 for the activations.
#pragma once
#include "cuda/mma_tile.cuh"
#include "cuda/prim_native.cuh"
#include "numbers/nvfp4_block.h"

namespace ei::cuda {

// The place of step s of a tile; and the step at place s.
EI_DEVICE int place_of_step(int s) { return s % 2 * 2 + s / 2; }
constexpr int kRowCodes = 32, kRowScales = 4;  // bytes of a row in a K tile

// Rows of activations as codes, in a workspace that starts at a multiple of 16 bytes.
struct Codes {
  char* codes;    // [R][K tiles][kRowCodes]
  char* scales;   // [R][K tiles][kRowScales]
  float* factor;  // [R]
  int64_t tiles;

  static int64_t bytes(int64_t R, int64_t tiles) {
    return R * tiles * (kRowCodes + kRowScales) + R * int64_t{sizeof(float)};
  }
  Codes(char* room, int64_t R, int64_t tiles_)
      : codes(room),
        scales(room + R * tiles_ * kRowCodes),
        factor(reinterpret_cast<float*>(room + R * tiles_ * (kRowCodes + kRowScales))),
        tiles(tiles_) {}
};

// ---- rows of x

constexpr int kQuantiseThreads = 128;
struct Largest {
  float of[kQuantiseThreads / kWarp];
};

template <class X>
EI_DEVICE void load_block(const X* x, float (&v)[kScaleBlock]) {
  EI_UNROLL
  for (int i = 0; i < kScaleBlock; i += kVector<X>) {
    float part[kVector<X>];
    load(x + i, part);
    EI_UNROLL
    for (int j = 0; j < kVector<X>; ++j) v[i + j] = part[j];
  }
}
EI_DEVICE float largest(const float (&v)[kScaleBlock]) {
  float amax = 0.0f;
  EI_UNROLL
  for (int i = 0; i < kScaleBlock; ++i) amax = max(amax, std::fabs(v[i]));
  return amax;
}

// Nibble i of the word for half h of a block holds this column of it: what a lane finds in the
// tile's words of lanes 2 h and 2 h + 1.
EI_DEVICE int column_of(int h, int i) { return 4 * h + i % 2 * 8 + i / 2 % 2 * 2 + i / 4; }

// Row r of `q` := the codes of x[0, columns), whose address is a multiple of 16 bytes. All of the
// kQuantiseThreads threads of a block come here, once.
template <class X>
EI_DEVICE void quantise_row(const X* x, int columns, const Codes& q, int64_t r) {
  EI_SHARED(Largest, found);
  const int blocks = columns / kScaleBlock;
  float v[kScaleBlock], amax = 0.0f;
  EI_UNROLL_BY(1)
  for (int b = threadIdx.x; b < blocks; b += kQuantiseThreads) {
    load_block(x + b * kScaleBlock, v);
    amax = max(amax, largest(v));
  }
  amax = max_lanes(amax);
  if (threadIdx.x % kWarp == 0) found.of[threadIdx.x / kWarp] = amax;
  __syncthreads();
  amax = 0.0f;
  for (float one : found.of) amax = max(amax, one);
  const float g = amax / (kE2m1Max * kE4m3Max);
  if (threadIdx.x == 0) q.factor[r] = g;
  EI_UNROLL_BY(1)
  for (int b = threadIdx.x; b < (blocks + 3) / 4 * 4; b += kQuantiseThreads) {
    uint8_t scale = 0;
    uint32_t word[2] = {0, 0};
    if (b < blocks) {
      load_block(x + b * kScaleBlock, v);
      bool finite = true;
      EI_UNROLL
      for (int i = 0; i < kScaleBlock; ++i) finite = finite && std::fabs(v[i]) < INFINITY;
      const Nvfp4Block block(largest(v), finite, g);
      scale = block.scale;
      EI_UNROLL
      for (int h = 0; h < 2; ++h) EI_UNROLL
      for (int i = 0; i < 8; ++i) word[h] |= uint32_t{block.code(v[column_of(h, i)])} << 4 * i;
    }
    const int64_t tile = r * q.tiles + b / 4;
    const int s = b % 4;
    uint32_t* to = reinterpret_cast<uint32_t*>(q.codes + tile * kRowCodes) + s / 2 * 4 + s % 2;
    to[0] = word[0], to[2] = word[1];
    q.scales[tile * kRowScales + place_of_step(s)] = static_cast<char>(scale);
  }
}

// ---- weights

// A fragment of 16 rows and the 64 columns of a tile, from the run at `run` in shared memory.
EI_DEVICE uint32_t nibbles(uint32_t pair) {
  return (pair >> 12 & 0x00080008u) | (pair >> 6 & 0x00070007u);
}
EI_DEVICE void native_fragment(const char* run, int lane, uint32_t (&a)[4]) {
  const char* at = run + (lane / 4 * 4 + lane % 2 * 2) * 16 + lane % 4 / 2 * 8;
  const Bytes8 low = load8(at), high = load8(at + 16);
  EI_UNROLL
  for (int i = 0; i < 2; ++i) {  // steps
    uint32_t p[4], q[4];
    e2m1_pairs(low.word[i], p);
    e2m1_pairs(high.word[i], q);
    EI_UNROLL
    for (int j = 0; j < 2; ++j)
      a[2 * i + j] =
          nibbles(p[j]) | nibbles(p[j + 2]) << 4 | nibbles(q[j]) << 8 | nibbles(q[j + 2]) << 12;
  }
}
// A byte of a tile (scale_byte) as the E4M3 scale that it was.
EI_DEVICE uint32_t e4m3_of(uint32_t byte) {
  return byte < 32 ? (8 | (byte & 7)) >> (4 - (byte >> 3)) : min(byte - 24, uint32_t{kE4m3Nan});
}
// The scales of row m of a run, those of `steps` and beyond zero, each in its place.
EI_DEVICE uint32_t native_scales(const char* run, int m, int steps) {
  const uint32_t bytes = load4(run + Nvfp4::kCodeBytes + m % 8 * 8 + m / 8 * 4);
  uint32_t word = 0;
  EI_UNROLL
  for (int s = 0; s < 4; ++s)
    if (s < steps) word |= e4m3_of(bytes >> 8 * s & 255) << 8 * place_of_step(s);
  return word;
}

// ---- products

// The tokens of a block by their rows among the codes.
template <int N>
using CodeTokens = Tokens<N, int>;

// What the ring holds of a K tile: runs of weights, then the tokens' codes, then their scales.
template <class Shape>
struct CodeRing {
  static constexpr int kWeights = kTileBytes<Nvfp4> / kTile * Shape::kM;
  static constexpr int kTileRoom = kWeights + Shape::kN * (kRowCodes + kRowScales);
  static constexpr int kStage = Shape::kWarpsK * kTileRoom;  // a K tile for every warp along K
  static constexpr int kRing = Shape::kStages * kStage;
  static constexpr int kShared = kRing > Shape::kSumBytes ? kRing : Shape::kSumBytes;
  static_assert(kShared <= 99 * 1024, "what a block of these cards may have");
};

// As TileProduct; sums lack the factors of rows and the scale of the weight.
template <class Shape>
class CodeProduct {
 public:
  EI_DEVICE CodeProduct(char* shared, const WeightRows& w, const Codes& x,
                        const CodeTokens<Shape::kN>& tokens)
      : shared_(shared), w_(w), x_(x), tokens_(tokens) {}

  EI_DEVICE void run(int columns) {
    constexpr int kColumns = kTile * Shape::kWarpsK;  // of a stage
    through_ring<Shape::kStages>((columns + kColumns - 1) / kColumns,
                                 [&](int number) { stage(number, columns); },
                                 [&](int number) { multiply(number, columns); });
    part_.write(shared_, sums_);  // the ring becomes the room for sums
    __syncthreads();
  }
  EI_DEVICE float sum(int token, int m) const { return BlockPart<Shape>::read(shared_, token, m); }

 private:
  using Room = CodeRing<Shape>;

  EI_DEVICE char* buffer(int stage) const {
    return shared_ + stage % Shape::kStages * Room::kStage;
  }

  EI_DEVICE void stage(int number, int columns) const {
    EI_UNROLL_BY(1)
    for (int k = 0; k < Shape::kWarpsK; ++k) {
      const int t = number * Shape::kWarpsK + k;
      if (t * kTile >= columns) break;
      char* weights = buffer(number) + k * Room::kTileRoom;
      char* codes = weights + Room::kWeights;
      char* scales = codes + Shape::kN * kRowCodes;
      constexpr int kChunks = kTileBytes<Nvfp4> / kTile * kRun / 16;  // of a run
      for (int i = threadIdx.x; i < Shape::kM / kRun * kChunks; i += Shape::kThreads) {
        const int m = i / kChunks * kRun;
        const char* from = w_.first + m / kTile * w_.tile_row + t * int64_t{kTileBytes<Nvfp4>} +
                           row_offset<Nvfp4>(m % kTile) + i % kChunks * 16;
        copy_async<16>(weights + i * 16, from, m < w_.rows);
      }
      for (int i = threadIdx.x; i < Shape::kN * 2; i += Shape::kThreads)
        copy_async<16>(codes + i * 16, x_.codes + tile_of(i / 2, t) * kRowCodes + i % 2 * 16,
                       reaches(i / 2, t));
      for (int i = threadIdx.x; i < Shape::kN; i += Shape::kThreads)
        copy_async<4>(scales + i * kRowScales, x_.scales + tile_of(i, t) * kRowScales,
                      reaches(i, t));
    }
  }
  EI_DEVICE bool reaches(int token, int t) const { return t * kTile < tokens_.columns[token]; }
  EI_DEVICE int64_t tile_of(int token, int t) const { return tokens_.x[token] * x_.tiles + t; }

  EI_DEVICE void multiply(int number, int columns) {
    const int t = number * Shape::kWarpsK + part_.k, lane = part_.lane;
    if (t * kTile >= columns) return;
    const int steps = min(4, (columns - t * kTile) / kRun);
    const char* weights = buffer(number) + part_.k * Room::kTileRoom +
                          part_.m * Shape::kM16 * row_offset<Nvfp4>(kRun);
    const char* codes = buffer(number) + part_.k * Room::kTileRoom + Room::kWeights;
    const char* scales = codes + Shape::kN * kRowCodes;
    // A lane's word of scales: of one of two runs, of one of four groups of 8 tokens.
    constexpr int kPairs = (Shape::kM16 + 1) / 2, kFours = (Shape::kN8 + 3) / 4;
    uint32_t a[Shape::kM16][4], scale_a[kPairs], scale_b[kFours];
    EI_UNROLL
    for (int m = 0; m < Shape::kM16; ++m)
      native_fragment(weights + m * row_offset<Nvfp4>(kRun), lane, a[m]);
    EI_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int run = min(2 * i + lane % 4 / 2, Shape::kM16 - 1);
      scale_a[i] =
          native_scales(weights + run * row_offset<Nvfp4>(kRun), lane / 4 + lane % 2 * 8, steps);
    }
    const int first = part_.n * Shape::kN8;
    EI_UNROLL
    for (int i = 0; i < kFours; ++i) {
      const int group = first + min(4 * i + lane % 4, Shape::kN8 - 1);
      scale_b[i] = load4(scales + (group * 8 + lane / 4) * kRowScales);
    }
    EI_UNROLL
    for (int n = 0; n < Shape::kN8; ++n) {
      const Bytes8 b = load8(codes + ((first + n) * 8 + lane / 4) * kRowCodes + lane % 4 * 8);
      EI_UNROLL
      for (int m = 0; m < Shape::kM16; ++m)
        multiply_add_nvfp4(sums_[m][n], a[m], b.word[0], b.word[1], scale_a[m / 2], scale_b[n / 4],
                           m % 2, n % 4);
    }
  }

  char* shared_;
  const WeightRows w_;
  const Codes& x_;
  const CodeTokens<Shape::kN>& tokens_;
  const BlockPart<Shape> part_;
  float sums_[Shape::kM16][Shape::kN8][4] = {};
};

}  // namespace ei::cuda
