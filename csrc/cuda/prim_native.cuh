// Machine instructions of single architectures, as prim.cuh has those of all: PTX under nvcc, and
// beside it what they mean as plain C++. Where the architecture lacks one it is a trap; the checks
// of an op let nobody come there (native.h). None of these has run on a GPU.
#pragma once
#include "cuda/prim.cuh"
#if !defined(__CUDACC__)
#include "emu/wgmma.h"
#endif

// Block-scaled products of warps: compute capability 12.x.
#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define EI_HAS_BLOCK_SCALE (__CUDA_ARCH_FAMILY_SPECIFIC__ == 1200)
#elif defined(__CUDA_ARCH_SPECIFIC__)
#define EI_HAS_BLOCK_SCALE (__CUDA_ARCH_SPECIFIC__ / 100 == 12)
#else
#define EI_HAS_BLOCK_SCALE 0
#endif

// Asynchronous products of warpgroups: compute capability 9.0.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EI_HAS_WGMMA 1
#else
#define EI_HAS_WGMMA 0
#endif

namespace ei::cuda {

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

// ---- asynchronous products of a warpgroup (four warps, the first a multiple of four)

// Makes what this thread wrote to shared memory, copies that it waited for included, visible to the
// products; a barrier makes it so for other threads'. PTX: "membar/fence" (fence.proxy.async).
EI_DEVICE void fence_products() {
#if EI_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Where p is in shared memory.
EI_DEVICE uint64_t shared_address(const void* p) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return emu::shared_address(p);
#endif
}

// A matrix in shared memory whose rows of 64 bfloat16 along K are 128 bytes, eight rows to 1024
// bytes (aligned so), the 16-byte chunk c of row r at place c ^ (r % 8): "128-Byte swizzling",
// K-major, from column `from` on. PTX: "Asynchronous Warpgroup Level Matrix Shared Memory Layout",
// "Matrix Descriptor Format" (stride offset 1024 bytes; the leading offset is not used).
EI_DEVICE uint64_t matrix_descriptor(const char* matrix, int from) {
  return ((shared_address(matrix) + from * 2) & 0x3ffff) >> 4 | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Ahead of the first product of several, whose sums others may have written.
// PTX: "Asynchronous Warpgroup Level Matrix Instructions: wgmma.fence", "wgmma.commit_group",
// "wgmma.wait_group".
EI_DEVICE void begin_products() {
#if defined(__CUDACC__)
#if EI_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
#else
  sync_warp();
#endif
}
// Closes the group of products begun since the last one.
EI_DEVICE void commit_products() {
#if defined(__CUDACC__)
#if EI_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
#else
  emu::commit_products();
#endif
}
// Waits until at most kPending groups are under way: until then their matrices must stay, and with
// none the sums d are there.
template <int kPending, int kN8>
EI_DEVICE void wait_products(float (&d)[kN8][4]) {
#if defined(__CUDACC__)
#if EI_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) {
    EI_UNROLL
    for (int i = 0; i < kN8; ++i)  // nobody uses them earlier
      asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
#endif
#else
  (void)d;
  sync_warp();
  emu::wait_products(kPending);
#endif
}

#define EI_SUMS4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define EI_SUMS16(i) EI_SUMS4(i), EI_SUMS4(i + 1), EI_SUMS4(i + 2), EI_SUMS4(i + 3)
#define EI_SUMS64(i) EI_SUMS16(i), EI_SUMS16(i + 4), EI_SUMS16(i + 8), EI_SUMS16(i + 12)

// d += a b^T for a [64 x 16] and b [8 kN8 x 16] of bfloat16 in shared memory, in float. Warp w of
// the group, lane l, with g = 16 w + l / 4 and c = 2 (l % 4), holds of columns 8 i + c and the next
// d[i][0..1] in row g and d[i][2..3] in row g + 8. PTX: "wgmma.mma_async", "Register Fragments for
// wgmma.mma_async.m64nNk16".
EI_DEVICE void multiply_add_async(float (&d)[16][4], uint64_t a, uint64_t b) {
#if defined(__CUDACC__)
#if EI_HAS_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, 1, 1, 1, 0, 0;"
      : EI_SUMS64(0)
      : "l"(a), "l"(b));
#else
  asm volatile("trap;");
#endif
#else
  sync_warp();
  emu::begin_product(&d[0][0], 64, a, b);
#endif
}
EI_DEVICE void multiply_add_async(float (&d)[32][4], uint64_t a, uint64_t b) {
#if defined(__CUDACC__)
#if EI_HAS_WGMMA
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "
      "%124, %125, %126, %127"
      "}, %128, %129, 1, 1, 1, 0, 0;"
      : EI_SUMS64(0), EI_SUMS64(16)
      : "l"(a), "l"(b));
#else
  asm volatile("trap;");
#endif
#else
  sync_warp();
  emu::begin_product(&d[0][0], 128, a, b);
#endif
}
#undef EI_SUMS4
#undef EI_SUMS16
#undef EI_SUMS64

}  // namespace ei::cuda
