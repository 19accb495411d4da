// Computes: fp8_quantize (fp8_quantize.h).
// Layout: a row of weights as floats in scratch.
// Work split: parts are rows.
// Scratch: K floats per thread.
// Limits: none.
// Speed: plain C++ for every instruction set; it runs once per checkpoint.
// Source: numbers/codes.h.
#include "fp8_quantize.h"

#include "cpu/quantise.h"

namespace ei::EI_ISA {

void fp8_quantize(const Fp8QuantizeArgs& a, Pool& pool) {
  const int64_t N = a.weight.shape[0], K = a.weight.shape[1];
  pool.run(N, [&](int64_t r, int thread) {
    float* x = reinterpret_cast<float*>(pool.scratch(thread));
    if (!finite_row("fp8_quantize", a.weight, r, x, pool)) return;
    uint8_t* codes = a.codes.ptr<uint8_t>() + r * a.codes.stride[0];
    for (int64_t c = 0; c < K; ++c) codes[c] = e4m3_from_float(x[c] / a.scale);
  });
}

}  // namespace ei::EI_ISA
