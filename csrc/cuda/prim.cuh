// Every machine instruction that the kernels name, once: as PTX under nvcc, and beside it what it
// means as plain C++, which the emulator (csrc/emu) runs. Nothing else contains inline PTX, but for
// prim_convert.cuh, its part for small floats and fused(), and prim_native.cuh, that for single
// architectures.
// "PTX:" gives the title of the section of NVIDIA's "Parallel Thread Execution ISA" manual.
#pragma once
#include <type_traits>

#include "numbers/small_floats.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define EI_DEVICE __device__ __forceinline__
#define EI_UNROLL _Pragma("unroll")
#define EI_UNROLL_BY(n) EI_PRAGMA(unroll n)
#define EI_PRAGMA(x) _Pragma(#x)
// Shared memory: one object of a static size, or what the launch asked for.
#define EI_SHARED(T, name) __shared__ T name
#define EI_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char ei_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(ei_dynamic_shared)
#else
#include "emu/emu.h"
#define EI_DEVICE inline
#define EI_UNROLL
#define EI_UNROLL_BY(n)
#define EI_SHARED(T, name)           \
  static const char name##_site = 0; \
  T& name = *static_cast<T*>(::ei::emu::shared_object(&name##_site, sizeof(T)))
#define EI_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::ei::emu::dynamic_shared())
#endif

namespace ei::cuda {

#if !defined(__CUDACC__)
using std::max;
using std::min;
#endif

constexpr int kWarp = 32;

// Sixteen bytes: the widest access of one thread.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

// ---- bfloat16

EI_DEVICE float float_from_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

EI_DEVICE uint32_t bits_from_float(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

using ei::from_float;
using ei::to_float;
EI_DEVICE float to_float(float x) { return x; }
EI_DEVICE float to_float(bf16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// Two floats as bfloat16, `low` in the low half; to nearest, ties to even.
// PTX: "Data Movement and Conversion Instructions: cvt" (cvt.rn.bf16x2.f32 d, a, b puts a on top).
EI_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const auto round = [](float x) -> uint32_t {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the instruction's NaN
    return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  };
  return round(high) << 16 | round(low);
#endif
}

// a * b of both halves, to nearest, ties to even; subnormals count.
// PTX: "Half Precision Floating Point Instructions: fma" (mul exists from sm_90 on; adding -0 keeps
// the sign of a zero).
EI_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
  return d;
#else
  return pack_bf16(float_from_bits(a << 16) * float_from_bits(b << 16),
                   float_from_bits(a & 0xffff0000u) * float_from_bits(b & 0xffff0000u));
#endif
}

// The bits of v moved down by n in [1, 31], those that fall out coming in on top.
// PTX: "Logic and Shift Instructions: shf" (shf.r.wrap of a word with itself).
EI_DEVICE uint32_t rotate_right(uint32_t v, int n) { return v >> n | v << (32 - n); }

EI_DEVICE void from_float(float x, float& out) { out = x; }
EI_DEVICE void from_float(float x, bf16& out) {
  out.bits = static_cast<uint16_t>(pack_bf16(x, 0.0f) & 0xffff);
}
// What x becomes when it is stored as T.
template <class T>
EI_DEVICE float rounded(float x) {
  T t;
  from_float(x, t);
  return to_float(t);
}

}  // namespace ei::cuda
#include "cuda/prim_convert.cuh"
namespace ei::cuda {

// ---- global memory

// A 16-byte read that will not be repeated (a weight): it takes no room in the first-level cache.
// PTX: "Data Movement and Conversion Instructions: ld.global.nc".
EI_DEVICE Bytes16 load_once(const void* p) {
  Bytes16 v;
#if defined(__CUDACC__)
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(p));
#else
  std::memcpy(&v, emu::aligned(p, 16, "16-byte read"), 16);
#endif
  return v;
}
EI_DEVICE Bytes16 load16(const void* p) {
#if defined(__CUDACC__)
  return *static_cast<const Bytes16*>(p);
#else
  Bytes16 v;
  std::memcpy(&v, emu::aligned(p, 16, "16-byte read"), 16);
  return v;
#endif
}
EI_DEVICE Bytes8 load8(const void* p) {
#if defined(__CUDACC__)
  return *static_cast<const Bytes8*>(p);
#else
  Bytes8 v;
  std::memcpy(&v, emu::aligned(p, 8, "8-byte read"), 8);
  return v;
#endif
}
EI_DEVICE uint32_t load4(const void* p) {
#if defined(__CUDACC__)
  return *static_cast<const uint32_t*>(p);
#else
  uint32_t v;
  std::memcpy(&v, emu::aligned(p, 4, "4-byte read"), 4);
  return v;
#endif
}
EI_DEVICE void store16(void* p, Bytes16 v) {
#if defined(__CUDACC__)
  *static_cast<Bytes16*>(p) = v;
#else
  std::memcpy(const_cast<void*>(emu::aligned(p, 16, "16-byte write")), &v, 16);
#endif
}

// Sixteen bytes of T as floats, and back. kVector<T> values of T fill 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

EI_DEVICE void unpack(Bytes16 b, float (&v)[4]) {
  for (int i = 0; i < 4; ++i) v[i] = float_from_bits(b.word[i]);
}
EI_DEVICE void unpack(Bytes16 b, float (&v)[8]) {
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = float_from_bits(b.word[i] << 16);
    v[2 * i + 1] = float_from_bits(b.word[i] & 0xffff0000u);
  }
}
template <class T, int N>
EI_DEVICE void load(const T* p, float (&v)[N]) {
  static_assert(N == kVector<T>, "16 bytes at a time");
  unpack(load16(p), v);
}
// N values side by side, in as few reads as they allow; 8 bytes for four bfloat16.
template <int N>
EI_DEVICE void load_floats(const float* p, float (&v)[N]) {
  for (int i = 0; i < N; i += 4) {
    float four[4];
    load(p + i, four);
    for (int j = 0; j < 4; ++j) v[i + j] = four[j];
  }
}
template <int N>
EI_DEVICE void load_floats(const bf16* p, float (&v)[N]) {
  static_assert(N == 4 || N == 8, "8 or 16 bytes");
  if constexpr (N == 8) {
    load(p, v);
  } else {
    const Bytes8 b = load8(p);
    for (int i = 0; i < 2; ++i) {
      v[2 * i] = float_from_bits(b.word[i] << 16);
      v[2 * i + 1] = float_from_bits(b.word[i] & 0xffff0000u);
    }
  }
}
EI_DEVICE void load_floats(const f16* p, float (&v)[4]) {
  const Bytes8 b = load8(p);
  for (int i = 0; i < 4; ++i)
    v[i] = float_from_half(static_cast<uint16_t>(b.word[i / 2] >> i % 2 * 16));
}
EI_DEVICE void load_floats(const e4m3* p, float (&v)[4]) {
  const uint32_t codes = load4(p);
  for (int i = 0; i < 2; ++i) {
    const uint32_t two = bf16_from_e4m3(codes >> 16 * i & 0xffffu);
    v[2 * i] = float_from_bits(two << 16);
    v[2 * i + 1] = float_from_bits(two & 0xffff0000u);
  }
}
EI_DEVICE void store(float* p, const float (&v)[4]) {
  Bytes16 b;
  for (int i = 0; i < 4; ++i) b.word[i] = bits_from_float(v[i]);
  store16(p, b);
}
// Four floats that float16 holds exactly.
EI_DEVICE void store(f16* p, const float (&v)[4]) {
  const uint32_t word[2] = {pack_halves(v[0], v[1]), pack_halves(v[2], v[3])};
#if defined(__CUDACC__)
  *reinterpret_cast<uint2*>(p) = make_uint2(word[0], word[1]);
#else
  std::memcpy(const_cast<void*>(emu::aligned(p, 8, "8-byte write")), word, 8);
#endif
}
EI_DEVICE void store(bf16* p, const float (&v)[8]) {
  Bytes16 b;
  for (int i = 0; i < 4; ++i) b.word[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
  store16(p, b);
}

// ---- asynchronous copies to shared memory

// Copies 4 or 16 bytes to shared memory, or writes zeros there when !valid (then nothing is read).
// PTX: "Data Movement and Conversion Instructions: cp.async" (.cg: past the first-level cache, for
// 16 bytes alone).
template <int kBytes>
EI_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 16, "sizes of a copy");
#if defined(__CUDACC__)
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
#else
  emu::aligned(shared, kBytes, "cp.async to shared memory");
  emu::aligned(global, kBytes, "cp.async");
  emu::copy_async(shared, global, kBytes, valid ? kBytes : 0);
#endif
}
// Closes the group of this thread's copies since the last one. PTX: "cp.async.commit_group".
EI_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::commit_copies();
#endif
}
// Waits until at most kPending of this thread's groups are under way. What other threads copied
// needs a barrier besides. PTX: "cp.async.wait_group".
template <int kPending>
EI_DEVICE void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emu::wait_copies(kPending);
#endif
}

// *p += v in shared memory, whole: the order of additions cannot be seen.
// PTX: "Parallel Synchronization and Communication Instructions: red".
EI_DEVICE void add_shared(uint64_t* p, uint64_t v) {
#if defined(__CUDACC__)
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
#else
  *p += v;  // the threads of a block take turns
#endif
}

// ---- warps

// PTX: "Parallel Synchronization and Communication Instructions: bar.warp.sync".
EI_DEVICE void sync_warp() {
#if defined(__CUDACC__)
  __syncwarp();
#else
  emu::warp<char, char>("sync_warp", 0, [](const char*, char* out) { std::memset(out, 0, 32); });
#endif
}
// The value of lane ^ mask. PTX: "Data Movement and Conversion Instructions: shfl.sync".
template <int kMask, class T>
EI_DEVICE T shuffle_xor(T v) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xffffffffu, v, kMask);
#else
  return emu::warp<T, T>("shuffle_xor", v, [](const T* in, T* out) {
    for (int i = 0; i < kWarp; ++i) out[i] = in[i ^ kMask];
  });
#endif
}
// The value of lane `from`. PTX: "shfl.sync".
template <class T>
EI_DEVICE T shuffle(T v, int from) {
#if defined(__CUDACC__)
  return __shfl_sync(0xffffffffu, v, from);
#else
  struct In {
    T v;
    int from;
  };
  return emu::warp<T, In>("shuffle", In{v, from}, [](const In* in, T* out) {
    for (int i = 0; i < kWarp; ++i) out[i] = in[in[i].from & 31].v;
  });
#endif
}
// One bit per lane. PTX: "vote.sync".
EI_DEVICE uint32_t ballot(bool v) {
#if defined(__CUDACC__)
  return __ballot_sync(0xffffffffu, v);
#else
  return emu::warp<uint32_t, bool>("ballot", v, [](const bool* in, uint32_t* out) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(in[i]) << i;
    for (int i = 0; i < kWarp; ++i) out[i] = bits;
  });
#endif
}

// How many bits are set. PTX: "Integer Arithmetic Instructions: popc".
EI_DEVICE int count_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Sum over aligned runs of kLanes lanes, the same bits in every lane; the order is fixed.
template <int kLanes = kWarp>
EI_DEVICE float sum_lanes(float v) {
  if constexpr (kLanes > 16) v += shuffle_xor<16>(v);
  if constexpr (kLanes > 8) v += shuffle_xor<8>(v);
  if constexpr (kLanes > 4) v += shuffle_xor<4>(v);
  if constexpr (kLanes > 2) v += shuffle_xor<2>(v);
  if constexpr (kLanes > 1) v += shuffle_xor<1>(v);
  return v;
}
// The largest over aligned runs of kLanes lanes, in every lane; NaN counts as nothing.
template <int kLanes = kWarp>
EI_DEVICE float max_lanes(float v) {
  if constexpr (kLanes > 16) v = fmaxf(v, shuffle_xor<16>(v));
  if constexpr (kLanes > 8) v = fmaxf(v, shuffle_xor<8>(v));
  if constexpr (kLanes > 4) v = fmaxf(v, shuffle_xor<4>(v));
  if constexpr (kLanes > 2) v = fmaxf(v, shuffle_xor<2>(v));
  if constexpr (kLanes > 1) v = fmaxf(v, shuffle_xor<1>(v));
  return v;
}
// Sum over a block of kWarps whole warps, the same bits in every thread. `room` is shared memory
// that nobody uses meanwhile; it may be used again after a barrier.
template <int kWarps>
EI_DEVICE float sum_block(float v, float (&room)[kWarps]) {
  v = sum_lanes(v);
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = v;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += room[i];
  return total;
}

// ---- matrix fragments

// Four 8x8 matrices of 16-bit values from shared memory: lane i gives the address of row i % 8 of
// matrix i / 8 (16 bytes, aligned); r[j] of lane l holds columns 2 (l % 4) and the next of row l /
// 4 of matrix j. With kTranspose, of the transposed matrix. PTX: "Warp Level Matrix Instructions:
// ldmatrix".
template <bool kTranspose = false>
EI_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#else
  using Row = const uint16_t*;
  const Row mine = static_cast<Row>(emu::aligned(row, 16, "ldmatrix"));
  const Bytes16 got = emu::warp<Bytes16, Row>(
      kTranspose ? "ldmatrix.trans" : "ldmatrix", mine, [](const Row* rows, Bytes16* out) {
        for (int l = 0; l < kWarp; ++l)
          for (int j = 0; j < 4; ++j) {
            const int i = l / 4, k = l % 4 * 2;
            const uint32_t low = kTranspose ? rows[j * 8 + k][i] : rows[j * 8 + i][k];
            const uint32_t high = kTranspose ? rows[j * 8 + k + 1][i] : rows[j * 8 + i][k + 1];
            out[l].word[j] = high << 16 | low;
          }
      });
  std::memcpy(r, got.word, 16);
#endif
}

// d += a b for a [16 x 16] by rows and b [16 x 8] by columns, of bfloat16, in float. Lane l, with
// g = l / 4 and c = 2 (l % 4), holds (low half first)
//   a[0..3]: rows g, g + 8, g, g + 8 of columns c, c + 1 (a[0], a[1]) and c + 8, c + 9 (a[2], a[3])
//   b[0..1]: rows c, c + 1 and c + 8, c + 9 of column g
//   d[0..3]: columns c, c + 1 of row g (d[0], d[1]) and of row g + 8 (d[2], d[3]).
// PTX: "Warp Level Matrix Instructions: mma", fragments of mma.m16n8k16.
EI_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct In {
    uint32_t a[4], b[2];
    float d[4];
  };
  struct Out {
    float d[4];
  };
  const In in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const Out out = emu::warp<Out, In>("mma.m16n8k16", in, [](const In* lane, Out* result) {
    float A[16][16], B[8][16];
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, c = l % 4 * 2;
      for (int j = 0; j < 4; ++j)
        for (int half = 0; half < 2; ++half)
          A[g + j % 2 * 8][c + j / 2 * 8 + half] =
              float_from_bits(half ? lane[l].a[j] & 0xffff0000u : lane[l].a[j] << 16);
      for (int j = 0; j < 2; ++j)
        for (int half = 0; half < 2; ++half)
          B[g][c + j * 8 + half] =
              float_from_bits(half ? lane[l].b[j] & 0xffff0000u : lane[l].b[j] << 16);
    }
    for (int l = 0; l < kWarp; ++l)
      for (int j = 0; j < 4; ++j) {
        const float* x = A[l / 4 + j / 2 * 8];
        const float* y = B[l % 4 * 2 + j % 2];
        float total = 0.0f;
        for (int k = 0; k < 16; ++k) total += x[k] * y[k];
        result[l].d[j] = lane[l].d[j] + total;
      }
  });
  std::memcpy(d, out.d, 16);
#endif
}

// 2^x, within 2 ulp. PTX: "Floating Point Instructions: ex2.approx".
EI_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// a / b within 2 ulp; 0 where |b| is above 2^126. PTX: "Floating Point Instructions: div.approx".
EI_DEVICE float divide_fast(float a, float b) {
#if defined(__CUDACC__)
  return __fdividef(a, b);
#else
  return std::fabs(b) > 8.507059e37f ? 0.0f : a / b;
#endif
}

}  // namespace ei::cuda
