// Small kernels that show what the emulator does and what it finds (selftest.cu).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ei::emu {
// "ok" if the kernel computed what a GPU would, otherwise what differs. Throws what a launch
// throws.
std::string selftest(const std::string& name);

// One multiply_add_nvfp4 (prim_native.cuh) of a warp, from zero: the lanes' registers one after the
// other.
std::vector<float> multiply_add_nvfp4(const std::vector<uint32_t>& a,
                                      const std::vector<uint32_t>& b,
                                      const std::vector<uint32_t>& scale_a,
                                      const std::vector<uint32_t>& scale_b, int pair_a, int lane_b);

// One multiply_add_async of a warpgroup, from zero, on shared memory that begins with `memory`.
// Descriptors count from there. The sums of the threads, one after the other.
std::vector<float> multiply_add_async(const std::vector<uint16_t>& memory, uint64_t a, uint64_t b,
                                      int columns);
// matrix_descriptor(shared memory + 1024 * atom, column), counted from there.
uint64_t matrix_descriptor(int atom, int column);
}  // namespace ei::emu
