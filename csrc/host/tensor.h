// A view of somebody else's tensor: pointer, dtype, shape, strides, device. Owns nothing.
#pragma once
#include <cstdint>
#include <string>

#if defined(__CUDACC__)
#define EI_HOST_DEVICE __host__ __device__
#else
#define EI_HOST_DEVICE
#endif

namespace ei {

// The first six are what ops take; fp8 and nvfp4 are what the tiles of a weight image may hold,
// never a tensor's own dtype; the others exist so that errors can name what was given.
enum class DType : int32_t {
  f32,
  bf16,
  f16,
  i32,
  i64,
  u8,
  fp8,
  nvfp4,
  f64,
  i8,
  i16,
  boolean,
  complex64,
  complex128,
  other
};

inline const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::u8: return "uint8";
    case DType::fp8: return "FP8";
    case DType::nvfp4: return "NVFP4";
    case DType::f64: return "float64";
    case DType::i8: return "int8";
    case DType::i16: return "int16";
    case DType::boolean: return "bool";
    case DType::complex64: return "complex64";
    case DType::complex128: return "complex128";
    default: return "unsupported dtype";
  }
}

inline int64_t dtype_size(DType t) {
  switch (t) {
    case DType::f32:
    case DType::i32: return 4;
    case DType::i64: return 8;
    case DType::bf16:
    case DType::f16: return 2;
    default: return 1;
  }
}

constexpr bool quantised(DType w) { return w == DType::fp8 || w == DType::nvfp4; }

// Bytes of one 64x64 tile of weights.
constexpr int64_t tile_bytes(DType w) {
  switch (w) {
    case DType::f32: return 64 * 64 * 4;
    case DType::bf16: return 64 * 64 * 2;
    case DType::fp8: return 64 * 64;
    default: return 64 * 64 / 2 + 64 * 64 / 16;  // NVFP4: codes, then block scales
  }
}

// Storage only; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {  // 8-bit float: sign, 4 bits of exponent, 3 of fraction; no infinity, NaN is 0x7f
  uint8_t bits;
};

constexpr int kMaxDims = 6;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::other;
  int32_t ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  bool cuda = false;
  int32_t device_id = 0;
  bool given = false;  // false for an optional argument that was None

  EI_HOST_DEVICE explicit operator bool() const { return given; }
  template <class T>
  EI_HOST_DEVICE T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // "float32[4, 64] on cpu"
  std::string describe() const;
};

}  // namespace ei
