// Computes: nvfp4_quantize (nvfp4_quantize.h), bit for bit what the CPU does. A value that is not
//   finite, which the CPU refuses, makes the scale of its block NaN: matmul_pack refuses that.
// Layout: rows as they are given, of any alignment.
// Work split: a thread per block of 16 columns, blocks along rows and those.
// Shared memory: none.
// Limits: K is a multiple of 16.
// Speed: not yet measured on a GPU; it runs once per checkpoint.
// Source: numbers/codes.h.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "numbers/nvfp4_block.h"
#include "nvfp4_quantize.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) quantize(const __grid_constant__ Nvfp4QuantizeArgs a) {
  const int64_t r = blockIdx.x;
  const int64_t block = blockIdx.y * int64_t{kThreads} + threadIdx.x;
  if (block >= a.block_scales.shape[1]) return;
  float x[kScaleBlock], amax = 0.0f;
  bool finite = true;
  EI_UNROLL
  for (int i = 0; i < kScaleBlock; ++i) {
    x[i] = value_at(a.weight, r * a.weight.stride[0] + block * kScaleBlock + i);
    amax = max(amax, std::fabs(x[i]));
    finite = finite && std::fabs(x[i]) < INFINITY;
  }
  const Nvfp4Block scaled(amax, finite, a.scale);
  row<uint8_t>(a.block_scales, r)[block] = scaled.scale;
  uint8_t* codes = row<uint8_t>(a.codes, r) + block * (kScaleBlock / 2);
  EI_UNROLL
  for (int i = 0; i < kScaleBlock; i += 2)
    codes[i / 2] = static_cast<uint8_t>(scaled.code(x[i]) | scaled.code(x[i + 1]) << 4);
}

void launch_nvfp4_quantize(const Nvfp4QuantizeArgs& a, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(a.weight.shape[0]),
                  static_cast<unsigned>(ceil_div(a.block_scales.shape[1], kThreads)));
  launch(call, quantize, grid, kThreads, 0, a);
}

const RegisterCuda<Nvfp4QuantizeArgs, launch_nvfp4_quantize> registered("nvfp4_quantize");

}  // namespace
}  // namespace ei::cuda
