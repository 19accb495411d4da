// Computes: kv_append (kv_append.h). A slot outside the pages is skipped like -1.
// Layout: a page holds its 64 tokens of one head side by side, [Hkv][64][K].
// Work split: one block per (row, KV head); its first half copies the key, its second the value.
// Shared memory: none.
// Limits: none; places that are not aligned to 16 bytes are copied value by value.
// Speed: not yet measured on a GPU. Floor: twice the bytes of k and v.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "kv_append.h"

namespace ei::cuda {
namespace {

constexpr int kThreads = 64;

template <class T, class KV>
__global__ void __launch_bounds__(kThreads) scatter(const __grid_constant__ KvAppendArgs a) {
  begin_kernel();
  const int64_t r = blockIdx.x, head = blockIdx.y, heads = gridDim.y;
  const int32_t slot = a.slot_mapping.ptr<int32_t>()[r];
  if (slot < 0 || slot >= a.k_pages.shape[0] * 64) return;
  const int K = static_cast<int>(a.k_pages.shape[3]);
  const bool value = threadIdx.x >= kThreads / 2;
  const int64_t place = ((slot / 64 * heads + head) * 64 + slot % 64) * K;
  const T* from = (value ? row<T>(a.v, r) : row<T>(a.k, r)) + head * K;
  KV* to = (value ? a.v_pages.ptr<KV>() : a.k_pages.ptr<KV>()) + place;
  const int me = threadIdx.x % (kThreads / 2);
  if constexpr (sizeof(KV) == 1) {
    const float scale = value ? a.v_scale : a.k_scale;
    for (int c = 2 * me; c < K; c += kThreads) {
      const bool both = c + 1 < K;
      const float next = both ? to_float(from[c + 1]) / scale : 0.0f;
      const uint32_t two = pack_e4m3(to_float(from[c]) / scale, next);
      to[c].bits = static_cast<uint8_t>(two);
      if (both) to[c + 1].bits = static_cast<uint8_t>(two >> 8);
    }
  } else {
    copy_row(to, from, K, me, kThreads / 2);
  }
}

void launch_kv_append(const KvAppendArgs& a, const CudaCall& call) {
  const dim3 grid(static_cast<unsigned>(a.k.shape[0]), static_cast<unsigned>(a.k_pages.shape[1]));
  const auto run = [&](auto* kernel) { launch_early(call, kernel, grid, kThreads, 0, a); };
  const bool codes = a.k_pages.dtype == DType::u8;
  if (a.k.dtype == DType::bf16)
    codes ? run(scatter<bf16, e4m3>) : run(scatter<bf16, bf16>);
  else
    codes ? run(scatter<float, e4m3>) : run(scatter<float, float>);
}

const RegisterCuda<KvAppendArgs, launch_kv_append> registered("kv_append");

}  // namespace
}  // namespace ei::cuda
