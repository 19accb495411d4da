// Computes: matmul (matmul.h) with bfloat16 x and weights, for many rows of x, with asynchronous
//   products of warpgroups (wgmma).
// Layout: row-major 64x64 tiles of 128-byte rows, swizzled on their way to shared memory: that is
//   the 128-byte K-major form that the products read (prim_native.cuh).
// Work split: a block has 128 weight rows and 128 or 256 rows of x ("tokens"); each of its two
//   warpgroups multiplies 64 weight rows with all tokens, 16 columns at a time, sums in registers.
//   K tiles come through a ring (cp.async by all threads); the products of one tile run while those
//   of the next are begun, so a place of the ring is written again two tiles after its use.
//   What lies beyond a block's prefix of K, or its rows, is zero in the ring and never read.
// Shared memory: 161 or 193 KiB.
// Limits: compute capability 9.0; x starts its rows at multiples of 16 bytes.
// Speed: never run on a GPU; `make gpu-check` times it beside the kernels of matmul.cu and cuBLAS.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#include "cuda/prim_native.cuh"
#include "matmul.cuh"

namespace ei::cuda {
namespace {

// What the ring holds of a K tile: 128 weight rows, then the tokens, 128 bytes each.
template <class Shape>
struct Ring {
  static constexpr int kAtom = 1024;  // what its places are aligned to
  static constexpr int kStage = (Shape::kM + Shape::kN) * 128;
  static constexpr int kShared = Shape::kStages * kStage + kAtom;
  static_assert(Shape::kStages * kStage >= Shape::kSumBytes, "sums take the ring's room");
  static_assert(kShared <= 227 * 1024 - sizeof(Tokens<Shape::kN>), "what a block may have");
};

template <class Shape>
class GroupProduct {
 public:
  EI_DEVICE GroupProduct(char* shared, const WeightRows& w, const Tokens<Shape::kN>& tokens,
                         int columns)
      : shared_(shared), w_(w), tokens_(tokens), columns_(columns) {}

  // As TileProduct::run().
  EI_DEVICE void run() {
    constexpr int kAhead = Shape::kStages - 2;
    const int tiles = (columns_ + kTile - 1) / kTile;
    for (int t = 0; t < kAhead; ++t) {
      if (t < tiles) stage(t);
      commit_copies();
    }
    for (int t = 0; t < tiles; ++t) {
      wait_copies<kAhead - 1>();
      fence_products();
      __syncthreads();  // tile t is there for all, and nobody's products read tile t - 2
      if (t + kAhead < tiles) stage(t + kAhead);
      commit_copies();
      multiply(t);
      wait_products<1>(sums_[0]);  // those of tile t - 1
    }
    wait_products<0>(sums_[0]);
    wait_copies<0>();
    __syncthreads();  // the ring becomes the room for sums
    BlockPart<Shape>().write(shared_, sums_);
    __syncthreads();
  }
  EI_DEVICE float sum(int token, int m) const { return BlockPart<Shape>::read(shared_, token, m); }

 private:
  EI_DEVICE char* buffer(int t) const { return shared_ + t % Shape::kStages * Ring<Shape>::kStage; }
  static EI_DEVICE int place(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

  EI_DEVICE void stage(int t) const {
    char* weights = buffer(t);
    char* x = weights + Shape::kM * 128;
    for (int i = threadIdx.x; i < Shape::kM * 8; i += Shape::kThreads) {
      const int m = i / 8, chunk = i % 8;
      const bool there = m < w_.rows && t * kTile + chunk * 8 < columns_;
      const char* from = w_.first + m / kTile * w_.tile_row + t * int64_t{kTileBytes<bf16>} +
                         row_offset<bf16>(m % kTile) + chunk * 16;
      copy_async<16>(weights + place(m, chunk), there ? from : w_.first, there);
    }
    for (int i = threadIdx.x; i < Shape::kN * 8; i += Shape::kThreads) {
      const int token = i / 8, chunk = i % 8, column = t * kTile + chunk * 8;
      const bool there = column < tokens_.columns[token];
      copy_async<16>(x + place(token, chunk), tokens_.x[token] + (there ? column : 0), there);
    }
  }

  EI_DEVICE void multiply(int t) {
    const char* weights = buffer(t) + threadIdx.x / 128 * 64 * 128;
    const char* x = buffer(t) + Shape::kM * 128;
    begin_products();
    EI_UNROLL
    for (int k = 0; k < kTile; k += 16)
      multiply_add_async(sums_[0], matrix_descriptor(weights, k), matrix_descriptor(x, k));
    commit_products();
  }

  char* shared_;
  const WeightRows w_;
  const Tokens<Shape::kN>& tokens_;
  const int columns_;
  float sums_[1][Shape::kN8][4] = {};
};

template <class Shape, class O>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    by_warpgroups(const __grid_constant__ MatmulArgs a) {
  EI_SHARED(Tokens<Shape::kN>, tokens);
  EI_DYNAMIC_SHARED(char, room);
  char* ring =
      room + (Ring<Shape>::kAtom - shared_address(room) % Ring<Shape>::kAtom) % Ring<Shape>::kAtom;
  const BlockWork<Shape> work(a, tokens);
  GroupProduct<Shape> product(ring, work.template weights<bf16>(), tokens, tokens.most_columns());
  if (work.needed()) product.run();
  work.template write<bf16, O>([&](int token, int m) { return product.sum(token, m); });
}

// 16 weight rows a warp, eight warps, all tokens in each.
using Tokens128Group = TileShape<1, 8, 1, 1, 128, 5>;
using Tokens256Group = TileShape<1, 8, 1, 1, 256, 4>;

template <class Shape>
void launch_shape(const MatmulArgs& a, const CudaCall& call) {
  const dim3 grid(blocks_of(a, Shape::kM),
                  static_cast<unsigned>(ceil_div(a.x.shape[0], Shape::kN)));
  auto* kernel =
      a.out.dtype == DType::bf16 ? by_warpgroups<Shape, bf16> : by_warpgroups<Shape, float>;
  launch(call, kernel, grid, Shape::kThreads, Ring<Shape>::kShared, a);
}

// Every sum is one accumulator that takes the columns in ascending order, in either shape.
void launch_wgmma(const MatmulArgs& a, const CudaCall& call) {
  require_aligned("matmul", "x", a.x);
  require_aligned("matmul", "w", a.w);
  if (a.x.shape[0] <= 128) return launch_shape<Tokens128Group>(a, call);
  launch_shape<Tokens256Group>(a, call);
}

const RegisterCuda<MatmulArgs, launch_wgmma> registered(kMatmulWgmma);

}  // namespace
}  // namespace ei::cuda
