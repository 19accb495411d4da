// Computes: nvfp4_quantize (nvfp4_quantize.h).
// Layout: a row of weights as floats in scratch, then 16 of them at a time.
// Work split: parts are rows.
// Scratch: K floats per thread.
// Limits: K is a multiple of 16.
// Speed: plain C++ for every instruction set; it runs once per checkpoint.
// Source: numbers/codes.h.
#include "nvfp4_quantize.h"

#include "cpu/quantise.h"
#include "numbers/nvfp4_block.h"

namespace ei::EI_ISA {

void nvfp4_quantize(const Nvfp4QuantizeArgs& a, Pool& pool) {
  const int64_t N = a.weight.shape[0], K = a.weight.shape[1];
  pool.run(N, [&](int64_t r, int thread) {
    float* x = reinterpret_cast<float*>(pool.scratch(thread));
    if (!finite_row("nvfp4_quantize", a.weight, r, x, pool)) return;
    uint8_t* codes = a.codes.ptr<uint8_t>() + r * a.codes.stride[0];
    uint8_t* scales = a.block_scales.ptr<uint8_t>() + r * a.block_scales.stride[0];
    for (int64_t c = 0; c < K; c += kScaleBlock) {
      float amax = 0.0f;
      for (int i = 0; i < kScaleBlock; ++i) amax = std::max(amax, std::fabs(x[c + i]));
      const Nvfp4Block block(amax, true, a.scale);
      scales[c / kScaleBlock] = block.scale;
      for (int i = 0; i < kScaleBlock; i += 2)
        codes[(c + i) / 2] =
            static_cast<uint8_t>(block.code(x[c + i]) | block.code(x[c + i + 1]) << 4);
    }
  });
}

}  // namespace ei::EI_ISA
