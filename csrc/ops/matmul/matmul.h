// matmul: out[r, c] = sum over k < k_r of x[r, k] * W[row(c), k], on tiled weights.
//
// W is float32, bfloat16, FP8 (E4M3 code times its segment's scale) or NVFP4 (E2M1 code times the
// E4M3 scale of its 16 columns times its segment's scale).
//
// W is an image of 64x64 tiles [N tiles][K tiles][tile bytes] (csrc/cpu/gemm.h). Its rows come in
// segments: segment s starts at tile row tile_row[s], has rows[s] rows, and its first row goes to
// output column column[s]. Row r of x uses the first k_sizes[w] columns and writes the first
// n_sizes[w, s] outputs of each segment, w = row_width[r]; the rest of each segment is written as
// zero. Without row_width every row uses all of K and all rows.
//
// On request, where the device can multiply 4-bit codes (matmul_w4a4.cu), rows of x become NVFP4 as
// well: out = act(W Q(x)), Q(x) what nvfp4_quantize makes of the first k_r values of the row with
// g = amax of these / (6 * 448). It is never chosen for the caller.
#pragma once
#include "host/isa.h"
#include "host/tensor.h"

namespace ei {

constexpr int kMaxSegments = 8;

enum class Activation : int { none = 0, relu2 = 1 };

struct MatmulArgs {
  Tensor x;          // [R, K] f32 or bf16, rows dense
  Tensor w;          // [N tiles, K tiles, tile bytes] u8
  DType w_dtype;     // what tiles hold: f32, bf16, fp8 or nvfp4, from their bytes
  Tensor scale;      // [segments] f32 for fp8 and nvfp4, else absent
  Tensor out;        // [R, N] f32 or bf16, rows dense
  Tensor row_width;  // [R] i32, may be absent
  Tensor k_sizes;    // [W] i32
  Tensor n_sizes;    // [W, S] i32
  int segments;
  int tile_row[kMaxSegments], column[kMaxSegments], rows[kMaxSegments];
  Activation activation;
  bool int8;  // rows of x as int8 (gemm_int8.h); the CPU alone
};

EI_CPU_KERNEL(matmul, MatmulArgs)

// The CUDA kernels that are asked for by name: for activations as NVFP4, and for bfloat16 with
// asynchronous products (compute capability 9.0), which computes what the others do.
constexpr const char *kMatmulW4a4 = "matmul_w4a4", *kMatmulWgmma = "matmul_wgmma";

// Packs rows of a plain matrix into tiles of an image.
struct PackArgs {
  Tensor source;        // [N, K] f32 or bf16; u8 codes [N, K] (fp8) or [N, K/2] (nvfp4), low four
                        // bits = even k; rows dense
  Tensor block_scales;  // [N, K/16] u8, E4M3, rows dense; nvfp4 alone
  Tensor image;         // [N tiles, K tiles, tile bytes] u8; tiles touched are fully written
  DType w_dtype;
  int tile_row;  // first tile row of the image to write
};

EI_CPU_KERNEL(matmul_pack, PackArgs)

}  // namespace ei
