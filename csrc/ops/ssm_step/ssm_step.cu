// Computes: ssm_step (ssm_step.h).
// Layout: state [P][N] per head in float or float16; a warp holds 4 rows of it in registers,
//   a lane 4 values of each, so that all reads of the state are under way before the first is used.
// Work split: blocks are (16 rows of state, head, sequence), a warp 4 rows: 256 blocks for one
//   sequence of 64 heads x 64. Every warp computes the head's time step itself: cheaper than a
//   barrier.
// Order: y sums 4 columns per lane, then lanes by butterfly. It depends on nothing but the head.
// Shared memory: none.
// Limits: P and N are multiples of 16, N at most 256; the state starts at multiples of 16 bytes.
// Speed: not yet measured on a GPU. Floor: the state in and out once.
// Source: Dao and Gu, "Transformers are SSMs"; the split of a head's rows over warps is common to
//   public decode kernels.
#include "cuda/launch.cuh"
#include "cuda/ssm.cuh"
#include "ssm_step.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / kWarp * kSsmRows;

template <class T, class State, int kSteps>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ SsmArgs a) {
  const int head = blockIdx.y;
  const int64_t s = blockIdx.z;
  const int32_t slot = a.slots.ptr<int32_t>()[s];
  if (slot < 0 || head >= active_size(a.seq_width, a.h_sizes, s, gridDim.y)) return;
  const int first = blockIdx.x * kRows + threadIdx.x / kWarp * kSsmRows;
  run_rows<T, State, kSteps>(a, s, s, s + 1, head, first);
}

void launch_ssm_step(const SsmArgs& a, const CudaCall& call) {
  require_grid("ssm_step", "slots", a.slots);
  require_aligned("ssm_step", "B", a.B);
  require_aligned("ssm_step", "C", a.C);
  require_aligned("ssm_step", "state", a.state);
  const dim3 grid(static_cast<unsigned>(a.state.shape[2] / kRows),
                  static_cast<unsigned>(a.state.shape[1]), static_cast<unsigned>(a.slots.shape[0]));
  by_kind(a, [&](auto x, auto state, auto steps) {
    launch(call, step<decltype(x), decltype(state), steps()>, grid, kThreads, 0, a);
  });
}

const RegisterCuda<SsmArgs, launch_ssm_step> registered("ssm_step");

}  // namespace
}  // namespace ei::cuda
