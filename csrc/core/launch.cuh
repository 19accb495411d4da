// Launching a kernel: <<<>>> under nvcc, the emulator under an ordinary compiler. Included by
// `*.cu`.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda.h"
#include "prim.cuh"

namespace ei::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kernel(args...) on `grid` blocks of `threads` threads. An empty grid is no launch.
template <class... Params, class... Args>
void launch(const CudaCall& call, void (*kernel)(Params...), dim3 grid, int threads,
            int64_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
  if (shared_bytes > 48 * 1024)  // beyond this a kernel must be told
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(call.stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel launch: ") + cudaGetErrorString(error));
#else
  (void)call;
  emu::launch(grid, dim3(threads), shared_bytes, [&] { kernel(args...); });
#endif
}

// Refuses a tensor whose rows a kernel reads 16 bytes at a time but that are not aligned so.
inline void require_aligned(const char* op, const char* name, const Tensor& t) {
  bool ok = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i + 1 < t.ndim; ++i)
    ok = ok && (t.shape[i] <= 1 || t.stride[i] * dtype_size(t.dtype) % 16 == 0);
  if (t && !ok)
    throw std::invalid_argument(std::string(op) + ": " + name +
                                " must have rows that start at multiples of 16 bytes, got " +
                                t.describe());
}

}  // namespace ei::cuda
