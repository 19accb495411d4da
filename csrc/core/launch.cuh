// Launching a kernel: <<<>>> under nvcc, the emulator under an ordinary compiler. Included by
// `*.cu`.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda.h"
#include "prim_grid.cuh"

namespace ei::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)
inline void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("CUDA kernel launch: ") + cudaGetErrorString(error));
}
#endif

// kernel(args...) on `grid` blocks of `threads` threads. An empty grid is no launch. `early`: the
// launch may begin before the one before it in the stream has ended.
template <class... Params, class... Args>
void launch_as(bool early, const CudaCall& call, void (*kernel)(Params...), dim3 grid, int threads,
               int64_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
  if (shared_bytes > 48 * 1024)  // beyond this a kernel must be told
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  check_launch(cudaLaunchKernelEx(&config, kernel, args...));
#else
  const emu::Launch one{grid, dim3(threads), static_cast<size_t>(shared_bytes),
                        [=] { kernel(args...); }, early};
  if (call.stream)
    static_cast<emu::Launches*>(call.stream)->push_back(one);
  else
    emu::run_all({one});
#endif
}

template <class... Params, class... Args>
void launch(const CudaCall& call, void (*kernel)(Params...), dim3 grid, int threads,
            int64_t shared_bytes, const Args&... args) {
  launch_as(false, call, kernel, grid, threads, shared_bytes, args...);
}

// As launch(), for a kernel whose threads all call begin_kernel() (prim_grid.cuh): where the step
// asks for it, it begins while the launch before it still runs. Ahead of that call it may read what
// no launch writes: weights, and the tables of widths, which are the host's.
template <class... Params, class... Args>
void launch_early(const CudaCall& call, void (*kernel)(Params...), dim3 grid, int threads,
                  int64_t shared_bytes, const Args&... args) {
  launch_as(call.dependent_launch, call, kernel, grid, threads, shared_bytes, args...);
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
