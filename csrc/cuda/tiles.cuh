// How a 64x64 tile of weights lies in a CUDA image, by what it holds: float and bf16 row-major;
// Fp8 (E4M3 codes) and Nvfp4 (E2M1 codes, one E4M3 scale per 16 columns) in the order in which the
// matrix instruction takes them as its first operand.
//
// A quantised tile is four runs of 16 rows. In a run lane l's codes of a step of 16 columns are
// what it holds of that fragment (prim.cuh, multiply_add): four pairs a[0..3]. They expand to
// bfloat16 in registers, exactly: an E2M1 code has 2 significant bits, an E4M3 scale 4, their
// product 6 of the 8 of bfloat16. So a block scale costs 4 multiplications of pairs per fragment,
// which they need anyhow to leave the range of subnormals, instead of 4 multiplications and
// additions of sums per fragment and per 8 rows of x; and sums need no flush at block ends.
//
//   Nvfp4 run, 576 bytes: [32 lanes][4 steps] words of 8 codes, one 16-byte read per lane and tile;
//     then [8][2][4 steps] scales: those of rows g and g + 8 are 8 bytes, g = l / 4.
//   Fp8 run, 1024 bytes: [2 pairs of steps][32 lanes][2 steps][2 words] of 4 codes.
//
// Instructions per fragment (8 weights of a lane): Nvfp4 9 shifts and masks, 4 for the two scales,
// 4 multiplications; Fp8 14 and 4. Bits of a word of 8 codes are placed so that a pair is what one
// mask (a[0]), one shift and one mask (a[1], a[2]) or two of each (a[3]) leave; codes side by side
// would take 15.
#pragma once
#include "cuda/prim.cuh"

namespace ei::cuda {

constexpr int kTile = 64, kTileValues = kTile * kTile;
constexpr int kRun = 16;  // rows of a run, and columns of a step

struct Nvfp4 {
  static constexpr int kCodeBytes = 512;  // of a run, before its scales
  // Fragments hold code * block scale / kFactor.
  static constexpr float kFactor = 256.0f;
  // What a lane reads of a run: everything it needs of 64 columns.
  struct Part {
    Bytes16 codes;
    Bytes8 scales;
  };
};
struct Fp8 {
  static constexpr float kFactor = 1.0f;
  struct Part {
    Bytes16 codes[2];
  };
};
template <class W>
constexpr bool kQuantised = std::is_same_v<W, Nvfp4> || std::is_same_v<W, Fp8>;

// Bytes of a tile of float or bf16 values; of codes.
template <class W>
constexpr int kTileBytes = kTileValues * static_cast<int>(sizeof(W));
template <>
inline constexpr int kTileBytes<Nvfp4> = kTileValues / 2 + kTileValues / 16;
template <>
inline constexpr int kTileBytes<Fp8> = kTileValues;

// Where row `row` of a tile starts (of a quantised one: its run, row % 16 == 0).
template <class W>
EI_DEVICE int row_offset(int row) {
  return kTileBytes<W> / kTile * row;
}

// ---- E2M1

// Eight codes as a word: pairs[j] holds the two codes of a[j], as their signs (bits 15 and 31) and
// their magnitudes (bits 6..8 and 22..24), which as bfloat16 is the code's value times 2^-126.
constexpr uint32_t kE2m1Bits = 0x81c081c0u;
EI_DEVICE uint32_t e2m1_word(const uint32_t (&pairs)[4]) {
  return pairs[0] | pairs[1] >> 6 | rotate_right(pairs[2], 26) | (pairs[3] & 0x81808180u) >> 4 |
         (pairs[3] & 0x00400040u) << 4;
}
EI_DEVICE void e2m1_pairs(uint32_t word, uint32_t (&pairs)[4]) {
  pairs[0] = word & kE2m1Bits;
  pairs[1] = word << 6 & kE2m1Bits;
  pairs[2] = rotate_right(word, 6) & kE2m1Bits;
  pairs[3] = (word << 4 & 0x81808180u) | (word >> 4 & 0x00400040u);
}
EI_DEVICE uint32_t e2m1_half(uint32_t code) { return (code & 8) << 12 | (code & 7) << 6; }

// A block scale as its byte in the tile: 5 bits of exponent, 3 of mantissa, no subnormals. Shifted
// to the place of bfloat16 and added to kScaleBase it is the scale times 2^118; a NaN is a NaN.
constexpr uint32_t kScaleBase = 0x75807580u, kNanScale = 167;
EI_DEVICE uint32_t scale_byte(uint32_t e4m3) {
  if ((e4m3 & 0x7f) == 0x7f) return kNanScale;
  uint32_t exponent = e4m3 >> 3 & 15, mantissa = e4m3 & 7;
  if (exponent > 0) return (exponent + 3) << 3 | mantissa;
  if (mantissa == 0) return 0;  // the codes of such a block are stored as zeros
  exponent = 4;
  for (; mantissa < 8; mantissa *= 2) --exponent;
  return exponent << 3 | (mantissa & 7);
}
EI_DEVICE uint32_t scale_pair(uint32_t byte) { return byte * 0x00100010u + kScaleBase; }

EI_DEVICE void e2m1_fragment(uint32_t word, uint32_t low_scale, uint32_t high_scale,
                             uint32_t (&a)[4]) {
  uint32_t pairs[4];
  e2m1_pairs(word, pairs);
  const uint32_t low = scale_pair(low_scale), high = scale_pair(high_scale);
  EI_UNROLL
  for (int j = 0; j < 4; ++j) a[j] = multiply_pairs(pairs[j], j % 2 ? high : low);
}

// ---- E4M3

// Four codes as a word: a pair in the high bytes of its halves, the next pair in the low bytes.
EI_DEVICE uint32_t e4m3_word(uint32_t low, uint32_t high, uint32_t next_low, uint32_t next_high) {
  return high << 24 | next_high << 16 | low << 8 | next_low;
}
// The pair in the high bytes. Shifted to the place of bfloat16 a code is its value times 2^-120,
// and is multiplied with 2^120 (in either half of the constant). A NaN becomes 480: images that
// are used hold none.
EI_DEVICE uint32_t e4m3_pair(uint32_t word) {
  return multiply_pairs((word & 0x80008000u) | (word >> 4 & 0x07f007f0u), 0x7b807b80u);
}

// ---- parts and fragments

// Lane `lane`'s part of the run at `run` (16-byte aligned), in device memory.
EI_DEVICE void load_part(const char* run, int lane, Nvfp4::Part& part) {
  part.codes = load_once(run + lane * 16);
  part.scales = load8(run + Nvfp4::kCodeBytes + lane / 4 * 8);
}
EI_DEVICE void load_part(const char* run, int lane, Fp8::Part& part) {
  part.codes[0] = load_once(run + lane * 16);
  part.codes[1] = load_once(run + 512 + lane * 16);
}
// Step `step` of a part as a fragment.
EI_DEVICE void fragment_of(const Nvfp4::Part& part, int step, uint32_t (&a)[4]) {
  e2m1_fragment(part.codes.word[step], part.scales.word[0] >> step * 8 & 255,
                part.scales.word[1] >> step * 8 & 255, a);
}
EI_DEVICE void fragment_of(const Fp8::Part& part, int step, uint32_t (&a)[4]) {
  EI_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = part.codes[step / 2].word[step % 2 * 2 + i];
    a[2 * i] = e4m3_pair(word);
    a[2 * i + 1] = e4m3_pair(word << 8);
  }
}
// Step `step` of the run at `run` in shared memory, nothing of other steps.
template <class W>
EI_DEVICE void load_fragment(const char* run, int lane, int step, uint32_t (&a)[4]) {
  if constexpr (std::is_same_v<W, Nvfp4>) {
    const auto* scales =
        reinterpret_cast<const uint8_t*>(run + W::kCodeBytes + lane / 4 * 8 + step);
    e2m1_fragment(load4(run + lane * 16 + step * 4), scales[0], scales[4], a);
  } else {
    const Bytes8 codes = load8(run + step / 2 * 512 + lane * 16 + step % 2 * 8);
    EI_UNROLL
    for (int i = 0; i < 2; ++i) {
      a[2 * i] = e4m3_pair(codes.word[i]);
      a[2 * i + 1] = e4m3_pair(codes.word[i] << 8);
    }
  }
}

// Where pair j of lane l's fragment is in a run: its row, and the first of its two columns.
EI_DEVICE int pair_row(int lane, int j) { return lane / 4 + j % 2 * 8; }
EI_DEVICE int pair_column(int lane, int j) { return lane % 4 * 2 + j / 2 * 8; }

}  // namespace ei::cuda
