// What the quantising ops share: a row of weights as floats, refused where one is not finite.
#pragma once
#include <string>

#include "cpu/vec.h"
#include "host/check.h"
#include "host/pool.h"

namespace ei::EI_ISA {

// Row r of `weight` [N, K] float32 or bfloat16 into `to`. False, with the pool's failure set, if a
// value is NaN or infinite.
inline bool finite_row(const char* op, const Tensor& weight, int64_t r, float* to, Pool& pool) {
  const int64_t K = weight.shape[1], at = r * weight.stride[0];
  bool finite = true;
  for (int64_t c = 0; c < K; ++c) {
    const float x = weight.dtype == DType::bf16 ? to_float(weight.ptr<bf16>()[at + c])
                                                : weight.ptr<float>()[at + c];
    to[c] = x;
    if (std::isfinite(x) || !finite) continue;
    pool.fail(std::string(op) + ": weight must be finite, got " + std::to_string(x) + " at row " +
              std::to_string(r) + ", column " + std::to_string(c));
    finite = false;
  }
  return finite;
}

}  // namespace ei::EI_ISA
