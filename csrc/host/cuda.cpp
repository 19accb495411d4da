// The table of CUDA kernels by op (cuda.h).
#include "host/cuda.h"

#include <cstring>
#include <vector>

namespace ei {
namespace {

std::vector<CudaKernel>& kernels() {
  static std::vector<CudaKernel> list;
  return list;
}

}  // namespace

void register_cuda_kernel(const CudaKernel& kernel) { kernels().push_back(kernel); }

const CudaKernel* find_cuda_kernel(const char* name) {
  for (const CudaKernel& k : kernels())
    if (std::strcmp(k.name, name) == 0) return &k;
  return nullptr;
}

}  // namespace ei
