// Computes: matmul (matmul.h) with NVFP4 weights and activations, codes by codes (w4a4.cuh).
// Layout: NVFP4 tiles as all kernels have them (tiles.cuh); codes of x in a workspace.
// Work split: one launch quantises, a block per row. The next multiplies, blocks of 16 to 128
//   weight rows x 8 to 128 rows of x.
// Shared memory: 8 to 68 KiB.
// Limits: compute capability 12.x; x starts its rows at multiples of 16 bytes; k sizes are
//   multiples of 16.
// Speed: never run on a GPU. Floor: as of matmul, with half the products' time of bfloat16 or less.
// Source: as of w4a4.cuh.
#include "cuda/w4a4.cuh"
#include "matmul.cuh"

namespace ei::cuda {
namespace {

template <class X>
__global__ void __launch_bounds__(kQuantiseThreads)
    quantise(const __grid_constant__ MatmulArgs a, const __grid_constant__ Codes q) {
  quantise_row(row<X>(a.x, blockIdx.x), columns_of(a, blockIdx.x), q, blockIdx.x);
}

template <class Shape, class O>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    codes_by_codes(const __grid_constant__ MatmulArgs a, const __grid_constant__ Codes x) {
  EI_SHARED(CodeTokens<Shape::kN>, tokens);
  EI_DYNAMIC_SHARED(char, ring);
  const BlockWork<Shape, int> work(a, tokens);
  CodeProduct<Shape> product(ring, work.template weights<Nvfp4>(), x, tokens);
  if (work.needed()) product.run(tokens.most_columns());
  const auto sum = [&](int token, int m) {
    return product.sum(token, m) *
           (a.scale.ptr<float>()[work.place.segment] * x.factor[tokens.x[token]]);
  };
  if (a.x.dtype == DType::bf16)
    work.template write<bf16, O>(sum);
  else
    work.template write<float, O>(sum);
}

template <class Shape>
void launch_shape(const MatmulArgs& a, const Codes& x, const CudaCall& call) {
  const dim3 grid(blocks_of(a, Shape::kM),
                  static_cast<unsigned>(ceil_div(a.x.shape[0], Shape::kN)));
  auto* kernel =
      a.out.dtype == DType::bf16 ? codes_by_codes<Shape, bf16> : codes_by_codes<Shape, float>;
  launch(call, kernel, grid, Shape::kThreads, CodeRing<Shape>::kShared, a, x);
}

int64_t workspace(const MatmulArgs& a, const CudaCall&) {
  return Codes::bytes(a.x.shape[0], a.w.shape[1]);
}

void launch_w4a4(const MatmulArgs& a, const CudaCall& call) {
  require_aligned("matmul", "x", a.x);
  require_aligned("matmul", "w", a.w);
  const int64_t R = a.x.shape[0];
  const Codes x(call.workspace, R, a.w.shape[1]);
  launch(call, a.x.dtype == DType::bf16 ? quantise<bf16> : quantise<float>,
         dim3(static_cast<unsigned>(R)), kQuantiseThreads, 0, a, x);
  with_shape(R, call.batch_invariant,
             [&](auto shape) { launch_shape<decltype(shape)>(a, x, call); });
}

const RegisterCuda<MatmulArgs, launch_w4a4, workspace> registered(kMatmulW4a4);

}  // namespace
}  // namespace ei::cuda
