// Machine instructions of single architectures, as prim.cuh has those of all: PTX under nvcc, and
// beside it what they mean as plain C++. Where the architecture lacks one it is a trap; the checks
// of an op let nobody come there (native.h). None of these has run on a GPU.
#pragma once
#include "prim.cuh"

// Block-scaled products of warps: compute capability 12.x.
#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define EI_HAS_BLOCK_SCALE (__CUDA_ARCH_FAMILY_SPECIFIC__ == 1200)
#elif defined(__CUDA_ARCH_SPECIFIC__)
#define EI_HAS_BLOCK_SCALE (__CUDA_ARCH_SPECIFIC__ / 100 == 12)
#else
#define EI_HAS_BLOCK_SCALE 0
#endif

namespace ei::cuda {

// As copy16_async(), 4 bytes. PTX: "Data Movement and Conversion Instructions: cp.async" (.ca).
EI_DEVICE void copy4_async(void* shared, const void* global, bool valid = true) {
#if defined(__CUDACC__)
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
#else
  emu::aligned(shared, 4, "cp.async to shared memory");
  emu::aligned(global, 4, "cp.async");
  emu::copy_async(shared, global, 4, valid ? 4 : 0);
#endif
}

// d += a b for a [16 x 64] by rows and b [64 x 8] by columns, of E2M1 codes, each code times the
// E4M3 scale of its 16 places along the 64, in float. Lane l, with g = l / 4 and t = l % 4, holds
//   a[0..3]: of rows g, g + 8, g, g + 8 the codes at 8 t (a[0], a[1]) and 8 t + 32 (a[2], a[3])
//   b0, b1: of column g the codes at 8 t and at 8 t + 32
//   d[0..3]: columns 2 t, 2 t + 1 of row g (d[0], d[1]) and of row g + 8 (d[2], d[3])
// with 8 codes in a word, the first in the lowest four bits. Scales are four bytes, the first in
// the lowest, and only some lanes' are read: row m's are scale_a of lane 4 (m % 8) + 2 kPairA +
// m / 8, column n's scale_b of lane 4 n + kLaneB. So the lanes' words serve 2 and 4 products.
// PTX: "Warp Level Matrix Instructions: mma", "Matrix Fragments for mma.m16n8k64", and "Block
// Scaling for mma.sync" (thread-id-a is kPairA, thread-id-b kLaneB; scale_vec::4X has byte-id 0).
template <int kPairA, int kLaneB>
EI_DEVICE void multiply_add_nvfp4(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  uint32_t scale_a, uint32_t scale_b) {
  static_assert(0 <= kPairA && kPairA < 2 && 0 <= kLaneB && kLaneB < 4, "selectors");
#if defined(__CUDACC__)
#if EI_HAS_BLOCK_SCALE
  asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col"
      ".f32.e2m1.e2m1.f32.ue4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "
      "{%10}, {%12, %13}, {%11}, {%12, %14};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scale_a), "r"(scale_b),
        "n"(0), "n"(kPairA), "n"(kLaneB));
#else
  asm volatile("trap;");
#endif
#else
  struct In {
    uint32_t a[4], b[2], scale_a, scale_b;
    float d[4];
  };
  struct Out {
    float d[4];
  };
  const In in{{a[0], a[1], a[2], a[3]}, {b0, b1}, scale_a, scale_b, {d[0], d[1], d[2], d[3]}};
  const Out out = emu::warp<Out, In>("mma.m16n8k64", in, [](const In* lane, Out* result) {
    float A[16][64], B[8][64];
    const auto value = [](uint32_t word, int i, uint32_t scales, int k) {
      return e2m1_to_float(static_cast<uint8_t>(word >> 4 * i & 15)) *
             e4m3_to_float(static_cast<uint8_t>(scales >> 8 * (k / 16)));
    };
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 8; ++i)
        for (int high = 0; high < 2; ++high) {
          const int g = l / 4, k = l % 4 * 8 + high * 32 + i;
          for (int half = 0; half < 2; ++half)
            A[g + half * 8][k] =
                value(lane[l].a[high * 2 + half], i, lane[g * 4 + kPairA * 2 + half].scale_a, k);
          B[g][k] = value(lane[l].b[high], i, lane[g * 4 + kLaneB].scale_b, k);
        }
    for (int l = 0; l < kWarp; ++l)
      for (int j = 0; j < 4; ++j) {
        float total = 0.0f;
        for (int k = 0; k < 64; ++k) total += A[l / 4 + j / 2 * 8][k] * B[l % 4 * 2 + j % 2][k];
        result[l].d[j] = lane[l].d[j] + total;
      }
  });
  std::memcpy(d, out.d, 16);
#endif
}

// With selectors that the compiler knows once loops are unrolled.
EI_DEVICE void multiply_add_nvfp4(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  uint32_t scale_a, uint32_t scale_b, int pair_a, int lane_b) {
  switch (pair_a * 4 + lane_b) {
    case 0: return multiply_add_nvfp4<0, 0>(d, a, b0, b1, scale_a, scale_b);
    case 1: return multiply_add_nvfp4<0, 1>(d, a, b0, b1, scale_a, scale_b);
    case 2: return multiply_add_nvfp4<0, 2>(d, a, b0, b1, scale_a, scale_b);
    case 3: return multiply_add_nvfp4<0, 3>(d, a, b0, b1, scale_a, scale_b);
    case 4: return multiply_add_nvfp4<1, 0>(d, a, b0, b1, scale_a, scale_b);
    case 5: return multiply_add_nvfp4<1, 1>(d, a, b0, b1, scale_a, scale_b);
    case 6: return multiply_add_nvfp4<1, 2>(d, a, b0, b1, scale_a, scale_b);
    default: return multiply_add_nvfp4<1, 3>(d, a, b0, b1, scale_a, scale_b);
  }
}

}  // namespace ei::cuda
