// Computes: ssm_scan (ssm_scan.h), token by token, state rows staying in registers from the first
// to the
//   last token of a sequence: exact in float, and equal in bits to ssm_step.
// Layout and work split: as ssm_step, one block walking through all tokens of its sequence.
// Order: tokens ascending; y as in ssm_step.
// Shared memory: none.
// Limits: P and N are multiples of 16, N at most 256; the state starts at multiples of 16 bytes.
// Speed: not yet measured on a GPU. It reads x, B, C once per 16 rows of state and is bound by the
//   latency of one token after the other: right for short pieces and for float32.
// Source: Dao and Gu, "Transformers are SSMs".
#include "../../core/launch.cuh"
#include "../../core/ssm.cuh"
#include "ssm_scan.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / kWarp * kSsmRows;

template <class T, class D, int kSteps>
__global__ void __launch_bounds__(kThreads) scan(const __grid_constant__ SsmArgs a) {
  const int head = blockIdx.y;
  const int64_t s = blockIdx.z;
  const int32_t slot = a.slots.ptr<int32_t>()[s];
  const int32_t* cu = a.cu_seqlens.ptr<int32_t>() + s;
  if (slot < 0 || head >= active_size(a.seq_width, a.h_sizes, s, gridDim.y)) return;
  const int first = blockIdx.x * kRows + threadIdx.x / kWarp * kSsmRows;
  run_rows<T, D, kSteps>(a, cu[0], cu[1], slot, head, first);
}

template <class T, class D>
void launch_dtype(const SsmArgs& a, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(a.state.shape[2] / kRows),
                  static_cast<unsigned>(a.state.shape[1]), static_cast<unsigned>(a.slots.shape[0]));
  launch(call, a.state.shape[3] > 128 ? scan<T, D, 2> : scan<T, D, 1>, grid, kThreads, 0, a);
}

void launch_ssm_scan(const SsmArgs& a, const CudaCall& call) {
  require_aligned("ssm_scan", "state", a.state);
  if (a.x.dtype == DType::f32)
    launch_dtype<float, float>(a, call);
  else if (a.dt.dtype == DType::f32)
    launch_dtype<bf16, float>(a, call);
  else
    launch_dtype<bf16, bf16>(a, call);
}

const RegisterCuda<SsmArgs, launch_ssm_scan> registered("ssm_scan");

}  // namespace
}  // namespace ei::cuda
