// Computes: embed (embed.h). An id outside the table copies nothing, fed or not.
// Layout: row-major rows; bits are copied, so both dtypes are exact.
// Work split: one block per row, 16 bytes per thread and pass.
// Shared memory: none.
// Limits: none; rows that are not aligned to 16 bytes are copied value by value.
// Speed: not yet measured on a GPU. Floor: twice the bytes of the rows.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "embed.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ EmbedArgs a) {
  begin_kernel();
  const int64_t r = blockIdx.x;
  const int32_t id = embed_id(a, r);
  if (id < 0 || id >= a.table.shape[0]) return;
  const int n = active_size(a.row_width, a.sizes, r, a.out.shape[1]);
  copy_row(row<T>(a.out, r), row<T>(a.table, id), n, threadIdx.x, kThreads);
}

void launch_embed(const EmbedArgs& a, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(a.out.shape[0]));
  if (a.table.dtype == DType::bf16)
    launch_early(call, gather<bf16>, grid, kThreads, 0, a);
  else
    launch_early(call, gather<float>, grid, kThreads, 0, a);
}

const RegisterCuda<EmbedArgs, launch_embed> registered("embed");

}  // namespace
}  // namespace ei::cuda
