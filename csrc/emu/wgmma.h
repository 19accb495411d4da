// Asynchronous matrix products of a warpgroup (wgmma) for the emulator: matrices in shared memory
// are found by their 64-bit descriptors, as the manual defines these.
//
// A product is computed by every thread for its own sums, as late as it may be: when it is waited
// for. So a matrix that is overwritten too early shows, and so do sums that are used too early:
// they are NaN from the first product until none is under way.
// What it cannot find: a missing fence between writes to shared memory and a product.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".
#pragma once
#include <cstdint>

namespace ei::emu {

// The address of dynamic shared memory as a descriptor holds it: its low ten bits are the
// pointer's.
uint64_t shared_address(const void* p);

// The value (row, column) of a K-major bfloat16 matrix with this descriptor.
float matrix_value(uint64_t descriptor, int row, int column);

// d += a b^T for a of 64 rows and b of 2 count rows, 16 columns of each; d: the `count` sums
// of the calling thread.
void begin_product(float* d, int count, uint64_t a, uint64_t b);
void commit_products();
void wait_products(int pending_groups);

}  // namespace ei::emu
