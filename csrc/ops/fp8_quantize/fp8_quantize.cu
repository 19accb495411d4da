// Computes: fp8_quantize (fp8_quantize.h), bit for bit what the CPU does. A value that is not
//   finite, which the CPU refuses, becomes the NaN code: matmul_pack refuses that.
// Layout: rows as they are given, of any alignment.
// Work split: a thread per value, blocks along rows and columns.
// Shared memory: none.
// Limits: none.
// Speed: not yet measured on a GPU; it runs once per checkpoint.
// Source: numbers/codes.h.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "fp8_quantize.h"
#include "numbers/codes.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) quantize(const __grid_constant__ Fp8QuantizeArgs a) {
  const int64_t r = blockIdx.x;
  const int64_t c = blockIdx.y * int64_t{kThreads} + threadIdx.x;
  if (c >= a.weight.shape[1]) return;
  const float x = value_at(a.weight, r * a.weight.stride[0] + c);
  row<uint8_t>(a.codes, r)[c] = std::fabs(x) < INFINITY ? e4m3_from_float(x / a.scale) : kE4m3Nan;
}

void launch_fp8_quantize(const Fp8QuantizeArgs& a, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(a.weight.shape[0]),
                  static_cast<unsigned>(ceil_div(a.weight.shape[1], kThreads)));
  launch(call, quantize, grid, kThreads, 0, a);
}

const RegisterCuda<Fp8QuantizeArgs, launch_fp8_quantize> registered("fp8_quantize");

}  // namespace
}  // namespace ei::cuda
