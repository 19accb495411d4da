// Computes: kv_append (kv_append.h). A slot outside the pages is skipped like -1.
// Layout: a page holds its 64 tokens of one head side by side, [Hkv][64][K].
// Work split: one block per (row, KV head); its first half copies the key, its second the value.
// Shared memory: none.
// Limits: none; places that are not aligned to 16 bytes are copied value by value.
// Speed: not yet measured on a GPU. Floor: twice the bytes of k and v.
#include "../../core/launch.cuh"
#include "../../core/rows.cuh"
#include "kv_append.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 64;

template <class T>
__global__ void __launch_bounds__(kThreads) scatter(const __grid_constant__ KvAppendArgs a) {
  const int64_t r = blockIdx.x, head = blockIdx.y, heads = gridDim.y;
  const int32_t slot = a.slot_mapping.ptr<int32_t>()[r];
  if (slot < 0 || slot >= a.k_pages.shape[0] * 64) return;
  const int K = static_cast<int>(a.k_pages.shape[3]);
  const bool value = threadIdx.x >= kThreads / 2;
  const int64_t place = ((slot / 64 * heads + head) * 64 + slot % 64) * K;
  const T* from = (value ? row<T>(a.v, r) : row<T>(a.k, r)) + head * K;
  T* to = (value ? a.v_pages.ptr<T>() : a.k_pages.ptr<T>()) + place;
  copy_row(to, from, K, threadIdx.x % (kThreads / 2), kThreads / 2);
}

void launch_kv_append(const KvAppendArgs& a, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(a.k.shape[0]), static_cast<unsigned>(a.k_pages.shape[1]));
  if (a.k.dtype == DType::bf16)
    launch(call, scatter<bf16>, grid, kThreads, 0, a);
  else
    launch(call, scatter<float>, grid, kThreads, 0, a);
}

const RegisterCuda<KvAppendArgs, launch_kv_append> registered("kv_append");

}  // namespace
}  // namespace ei::cuda
