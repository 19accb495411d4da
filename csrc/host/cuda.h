// How the binding of an op reaches its CUDA kernels: `<op>.cu` registers a launch function under
// the op's name. A launch never allocates, never synchronises and reads nothing of the device; what
// it needs besides the op's own arguments is in the CudaCall.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ei {

struct CudaCall {
  void* stream = nullptr;         // cudaStream_t
  char* workspace = nullptr;      // as many bytes as the op asked for, 256-byte aligned
  int multiprocessors = 0;        // of the device; 0: unknown, then no op spreads work beyond need
  int compute_capability = 0;     // of the device: major * 10 + minor
  bool batch_invariant = false;   // a row's bits depend on nothing that shares its launch
  bool dependent_launch = false;  // launch_early() may overlap launches (launch.cuh)
};

struct CudaKernel {
  const char* name;
  size_t args_bytes;  // guards against a wrong argument struct
  void (*launch)(const void* args, const CudaCall& call);
  // Null: none. The call's own workspace is not there yet.
  int64_t (*workspace_bytes)(const void* args, const CudaCall& call);
};

// The kernels registered under a name, or null.
const CudaKernel* find_cuda_kernel(const char* name);
void register_cuda_kernel(const CudaKernel& kernel);

// A static object of `<op>.cu`. `Launch` and `Workspace` are functions of (const Args&, ...).
template <class Args, void (*Launch)(const Args&, const CudaCall&),
          int64_t (*Workspace)(const Args&, const CudaCall&) = nullptr>
struct RegisterCuda {
  explicit RegisterCuda(const char* name) {
    CudaKernel kernel{name, sizeof(Args),
                      [](const void* args, const CudaCall& call) {
                        Launch(*static_cast<const Args*>(args), call);
                      },
                      nullptr};
    if constexpr (Workspace != nullptr)
      kernel.workspace_bytes = [](const void* args, const CudaCall& call) {
        return Workspace(*static_cast<const Args*>(args), call);
      };
    register_cuda_kernel(kernel);
  }
};

}  // namespace ei
