// The part of prim.cuh that concerns blocks of one launch, and launches, among each other.
#pragma once
#include "prim.cuh"

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

}  // namespace ei::cuda
