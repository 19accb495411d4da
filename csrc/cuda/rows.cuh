// What most kernels do with rows: find one, find its width, copy it, clear its tail.
#pragma once
#include "cuda/prim.cuh"

namespace ei::cuda {

template <class T>
EI_DEVICE T* row(const Tensor& t, int64_t r) {
  return t.ptr<T>() + r * t.stride[0];
}

// Value i of a small tensor whose dtype, float32 or bfloat16, is not worth kernels of its own.
EI_DEVICE float value_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::f32 ? t.ptr<float>()[i] : to_float(t.ptr<bf16>()[i]);
}

// The active size of row r: sizes[row_width[r]], or `full` where there is no table.
EI_DEVICE int active_size(const Tensor& row_width, const Tensor& sizes, int64_t r, int64_t full) {
  return row_width ? sizes.ptr<int32_t>()[row_width.ptr<int32_t>()[r]] : static_cast<int>(full);
}

// to[0, n) = from[0, n) by the threads `me` of `threads`: 16 bytes at a time where both are
// aligned.
template <class T>
EI_DEVICE void copy_row(T* to, const T* from, int n, int me, int threads) {
  constexpr int V = kVector<T>;
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) == 0;
  const int whole = aligned ? n / V * V : 0;
  EI_UNROLL_BY(1)  // one pass or few: unrolled it spills for nothing
  for (int c = me * V; c < whole; c += threads * V) store16(to + c, load16(from + c));
  EI_UNROLL_BY(1)
  for (int c = whole + me; c < n; c += threads) to[c] = from[c];
}

// to[begin, end) = 0.
template <class T>
EI_DEVICE void clear_row(T* to, int begin, int end, int me, int threads) {
  T zero;
  from_float(0.0f, zero);
  EI_UNROLL_BY(1)
  for (int c = begin + me; c < end; c += threads) to[c] = zero;
}

// x * sigmoid(x).
EI_DEVICE float silu(float x) { return divide_fast(x, 1.0f + expf(-x)); }

}  // namespace ei::cuda
