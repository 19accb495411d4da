// The part of prim.cuh that concerns blocks of one launch, and launches, among each other.
#pragma once
#include <algorithm>

#include "cuda/prim.cuh"

namespace ei::cuda {

// Adds one to a counter in global memory and gives what it was. Whoever comes later sees what those
// who came earlier had written; a barrier before it makes that all of a block's writes, a barrier
// after it lets the whole block see them. No block waits: the last to come does what needs all.
// PTX: "Parallel Synchronization and Communication Instructions: atom" (.acq_rel.gpu).
EI_DEVICE int arrive(int32_t* counter) {
#if defined(__CUDACC__)
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
#else
  return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
#endif
}

// Rows (or others of which there may be many) along y of a grid, and where there are more than it
// takes, along z too: then blocks may be left over, whose row is beyond the last.
constexpr int64_t kMostGridY = 65535;  // and z; x takes 2^31 - 1
inline dim3 grid_of_rows(int64_t x, int64_t rows) {
  const int64_t y = std::min(rows, kMostGridY);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y),
              static_cast<unsigned>(y ? (rows + y - 1) / y : 0));
}
// The row of a block of such a grid.
EI_DEVICE int64_t row_of_grid() {
  return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
}

// Waits until the launches ahead of this one have ended and what they wrote can be seen; at once in
// a launch that begins after them anyway.
// PTX: "Parallel Synchronization and Communication Instructions: griddepcontrol" (.wait; sm_90).
EI_DEVICE void wait_for_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  emu::wait_for_launches();
#endif
}

// The launch behind this one may begin, as soon as all blocks of this one came here or left. The
// emulator begins it even earlier. PTX: "griddepcontrol" (.launch_dependents; sm_90).
EI_DEVICE void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What a kernel of launch_early() calls in every thread, ahead of all that earlier launches write
// or read. Waiting first keeps launches two apart from overlapping: when the next one begins, the
// one ahead of this is over.
EI_DEVICE void begin_kernel() {
  wait_for_launches();
  let_next_begin();
}

// Asks for the 128 bytes around p to be brought into the second-level cache.
// PTX: "Data Movement and Conversion Instructions: prefetch" (.global.L2).
EI_DEVICE void prefetch_l2(const void* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  static_cast<void>(*static_cast<const volatile char*>(p));  // out of bounds shows
#endif
}

}  // namespace ei::cuda
