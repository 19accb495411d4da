// Launching a kernel: <<<>>> under nvcc, the emulator under an ordinary compiler. Included by
// `*.cu`.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/prim_grid.cuh"
#include "host/cuda.h"

namespace ei::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory of a block, dynamic and static together: what every device has room for (8.6, 8.9
// and 12.x have no more), and what a kernel gets without being told that it may have more.
constexpr int64_t kLeastShared = 99 * 1024, kUntoldShared = 48 * 1024;
// What kernels whose dynamic size follows from shapes may have beside it.
constexpr int64_t kFewStatic = 3 * 1024;
// Static objects of any kernel are smaller than this; tests/test_ptxas.py holds them to it.
constexpr int64_t kMostStatic = 16 * 1024;
// Whether a kernel that asks for so much must be told: its static objects count as well.
inline bool must_be_told(int64_t dynamic_bytes) {
  return dynamic_bytes + kMostStatic > kUntoldShared;
}

#if defined(__CUDACC__)
inline void check_launch(cudaError_t error, dim3 grid, int threads, int64_t shared_bytes) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("CUDA kernel launch: ") + cudaGetErrorString(error) +
                           " (grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                           " x " + std::to_string(grid.z) + ", " + std::to_string(threads) +
                           " threads, " + std::to_string(shared_bytes) +
                           " bytes of dynamic shared memory)");
}
#endif

// kernel(args...) on `grid` blocks of `threads` threads. An empty grid is no launch. `early`: the
// launch may begin before the one before it in the stream has ended.
template <class... Params, class... Args>
void launch_as(bool early, const CudaCall& call, void (*kernel)(Params...), dim3 grid, int threads,
               int64_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
  if (must_be_told(shared_bytes))
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 grid, threads, shared_bytes);
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
  check_launch(cudaLaunchKernelEx(&config, kernel, args...), grid, threads, shared_bytes);
#else
  emu::Launch one;
  one.grid = grid, one.block = dim3(threads);
  one.shared_bytes = static_cast<size_t>(shared_bytes);
  one.told = must_be_told(shared_bytes);
  one.argument_bytes = (size_t{0} + ... + sizeof(Params));
  one.kernel = reinterpret_cast<const void*>(kernel);
  one.body = [=] { kernel(args...); };
  one.early = early;
  emu::submit(static_cast<emu::Launches*>(call.stream), one);
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

// Refuses a tensor with more entries (sequences) than a grid's y and z take.
inline void require_grid(const char* op, const char* name, const Tensor& t) {
  if (t.shape[0] > kMostGridY)
    throw std::invalid_argument(std::string(op) + ": " + name + " must have at most " +
                                std::to_string(kMostGridY) + " entries on a GPU, got " +
                                t.describe());
}

// Refuses a tensor that makes `bytes` of shared memory needed, more than there is on any GPU.
inline void require_shared(const char* op, const char* name, const Tensor& t, int64_t bytes) {
  if (bytes > kLeastShared - kFewStatic)
    throw std::invalid_argument(std::string(op) + ": " + name + " must need at most " +
                                std::to_string(kLeastShared - kFewStatic) +
                                " bytes of shared memory on a GPU, got " + t.describe() +
                                ", which needs " + std::to_string(bytes));
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
