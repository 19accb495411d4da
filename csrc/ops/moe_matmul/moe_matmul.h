// moe_matmul: out[r] = sum over j of weights[r, j] * down[e](relu(up[e] x[r])^2) (+ shared[r]),
// e = ids[r, j]. The up product, its activation and the down product are each rounded to the type
// of x, as three separate steps would; the sum is taken in float by ascending expert and rounded
// once. Row r uses its first k_sizes[w] hidden channels on both sides (out is zero beyond) and
// the first f_sizes[w] of an expert's width, w = row_width[r].
//
// Experts are tiled images (csrc/cpu/gemm.h) [E][row tiles][column tiles][tile bytes]. Experts
// without rows are never read, nor is anything outside the widest prefix among an expert's rows.
//
// On request, where the device can multiply 4-bit codes (moe_matmul_w4a4.cu), rows become NVFP4 as
// for matmul (matmul.h): row r of x over its first k columns, once for all of its experts, and what
// each of them gives it, relu(up x)^2, over its first f.
#pragma once
#include <algorithm>

#include "host/isa.h"
#include "host/tensor.h"
#include "numbers/codes.h"

namespace ei {

struct MoeMatmulArgs {
  Tensor x;           // [R, D] f32 or bf16, rows dense
  Tensor up;          // [E, F tiles, D tiles, tile bytes] u8
  Tensor down;        // [E, D tiles, F tiles, tile bytes] u8
  DType w_dtype;      // what the tiles of both hold: f32, bf16, fp8 or nvfp4
  Tensor up_scale;    // [E] f32 for fp8 and nvfp4, else absent
  Tensor down_scale;  // [E] f32, as up_scale
  int64_t F;          // expert width
  Tensor ids;         // [R, J] i32
  Tensor weights;     // [R, J] f32
  Tensor out;         // [R, D], type of x
  Tensor shared;      // [R, D], type of x, may be absent
  Tensor workspace;   // moe_workspace().bytes
  Tensor row_width;   // [R] i32, may be absent
  Tensor k_sizes;     // [W] i32
  Tensor f_sizes;     // [W] i32
  bool int8;          // rows of x and of the middle as int8 (gemm_int8.h); the CPU alone
};

// Where things lie in the workspace, as byte offsets. n = R * J routed rows ("entries").
struct MoeWorkspace {
  int64_t entry;   // [n] i32: r * J + j of each entry, sorted by expert, then by row
  int64_t order;   // [R, J] i32: where row r's entries stand, by ascending expert
  int64_t begin;   // [E + 1] i32: first entry of each expert
  int64_t cursor;  // [max(E, R)] i32
  int64_t active;  // [E] i32: the experts that have entries
  int64_t k, f;    // [R] i32: active sizes of each row
  int64_t middle;  // [n, F] of x's type, or [n, F tiles] as int8: relu(up x)^2
  int64_t result;  // [n, D] of x's type: down(middle); before that, [R, D tiles]: x as int8
  int64_t bytes;   // of everything
};

inline MoeWorkspace moe_workspace(int64_t R, int64_t J, int64_t E, int64_t D, int64_t F,
                                  int64_t itemsize) {
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
  };
  MoeWorkspace w;
  w.entry = take(R * J * 4);
  w.order = take(R * J * 4);
  w.begin = take((E + 1) * 4);
  w.cursor = take((E > R ? E : R) * 4);
  w.active = take(E * 4);
  w.k = take(R * 4);
  w.f = take(R * 4);
  const int64_t f_tiles = (F + 63) / 64, d_tiles = (D + 63) / 64;
  w.middle = take(std::max(R * J * F * itemsize, R * J * f_tiles * kInt8TileBytes));
  w.result = take(std::max(R * J * D * itemsize, R * d_tiles * kInt8TileBytes));
  w.bytes = at;
  return w;
}

EI_CPU_KERNEL(moe_matmul, MoeMatmulArgs)

// The CUDA kernels for activations as NVFP4, asked for by name.
constexpr const char* kMoeMatmulW4a4 = "moe_matmul_w4a4";

}  // namespace ei
