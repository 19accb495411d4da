// Computes: moe_matmul (moe_matmul.h) with NVFP4 weights and activations, codes by codes
//   (w4a4.cuh): rows of x and rows of the middle are both quantised, each over its own prefix.
// Layout: experts in NVFP4 tiles as all kernels have them (tiles.cuh); codes in a workspace of
//   their own, those of x and then those of the middle in the same place.
// Work split: entries sorted by expert, as in moe_matmul.cu; rows of x quantised, a block each; up
//   products, blocks along (expert channels, expert), looping over the expert's entries, whose rows
//   they find among the codes of x; rows of the middle quantised, a block per entry; down products,
//   blocks along (hidden channels, expert); per row the sum over its entries. Any number of rows
//   goes this way, so a decode step has six launches where moe_matmul.cu has two.
// Order: as of moe_matmul.cu; under batch_invariant products leave K whole (mma_tile.cuh).
// Shared memory: 8 to 68 KiB.
// Limits: compute capability 12.x; D, F and their prefixes are multiples of 16; x, shared and out
//   start their rows at multiples of 16 bytes.
// Speed: never run on a GPU. Floor: the weights of the distinct experts that rows name.
// Source: as of w4a4.cuh and moe_matmul.cu.
#include <algorithm>

#include "cuda/w4a4.cuh"
#include "moe_matmul.cuh"

namespace ei::cuda {
namespace {

// Block r: row r of x; block p: entry p of the middle.
template <class X>
__global__ void __launch_bounds__(kQuantiseThreads)
    quantise_x(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Codes q) {
  begin_kernel();
  const int r = blockIdx.x;
  quantise_row(row<X>(a.x, r), hidden_of(a, r), q, r);
}
template <class X>
__global__ void __launch_bounds__(kQuantiseThreads)
    quantise_middle(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m,
                    const __grid_constant__ Codes q) {
  begin_kernel();
  const int p = blockIdx.x;
  quantise_row(reinterpret_cast<const X*>(m.middle) + static_cast<int64_t>(p) * m.F,
               width_of(a, m.entry[p] / m.J), q, p);
}

// One direction: the weight rows of block x of expert y times all entries of the expert.
template <class Shape, bool kUp>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    grouped_codes(const __grid_constant__ MoeMatmulArgs a, const __grid_constant__ Moe m,
                  const __grid_constant__ Codes q) {
  begin_kernel();
  EI_SHARED(CodeTokens<Shape::kN>, tokens);
  EI_DYNAMIC_SHARED(char, ring);
  const ExpertWork<Shape, kUp, int> work{a, m, tokens};
  const WeightRows weights = work.template weights<Nvfp4>();
  const float scale = work.scale().template ptr<float>()[work.e];
  work.each([](int r, int p) { return kUp ? r : p; },
            [&](int at, int count) {
              CodeProduct<Shape> product(ring, weights, q, tokens);
              product.run(tokens.most_columns());
              const auto sum = [&](int token, int n) {
                return product.sum(token, n) * (scale * q.factor[tokens.x[token]]);
              };
              if (a.x.dtype == DType::bf16)
                work.template write<bf16>(at, count, sum);
              else
                work.template write<float>(at, count, sum);
            });
}

template <class Shape, bool kUp>
void launch_grouped(const MoeMatmulArgs& a, const Moe& m, const Codes& q, const CudaCall& call) {
  launch_early(call, grouped_codes<Shape, kUp>, expert_grid<Shape>(m, kUp ? m.F : m.D),
               Shape::kThreads, CodeRing<Shape>::kShared, a, m, q);
}

int64_t workspace(const MoeMatmulArgs& a, const CudaCall&) {
  const int64_t R = a.x.shape[0];
  return std::max(Codes::bytes(R, a.up.shape[2]),
                  Codes::bytes(R * a.ids.shape[1], a.down.shape[2]));
}

void launch_w4a4(const MoeMatmulArgs& a, const CudaCall& call) {
  require_aligned_rows(a);
  const Moe m = make_moe(a);
  const int n = m.R * m.J;
  if (n == 0) return;
  const bool narrow = a.x.dtype == DType::bf16;
  const Codes x(call.workspace, m.R, a.up.shape[2]), middle(call.workspace, n, a.down.shape[2]);
  launch_sort(a, m, call);
  launch_early(call, narrow ? quantise_x<bf16> : quantise_x<float>, dim3(m.R), kQuantiseThreads, 0,
               a, x);
  with_shape_of_experts(m, call, [&](auto shape) {
    launch_grouped<decltype(shape), true>(a, m, x, call);
    launch_early(call, narrow ? quantise_middle<bf16> : quantise_middle<float>, dim3(n),
                 kQuantiseThreads, 0, a, m, middle);
    launch_grouped<decltype(shape), false>(a, m, middle, call);
  });
  launch_combine(a, m, call);
}

const RegisterCuda<MoeMatmulArgs, launch_w4a4, workspace> registered(kMoeMatmulW4a4);

}  // namespace
}  // namespace ei::cuda
