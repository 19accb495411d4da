// Small kernels that show what the emulator does and what it finds (selftest.cu).
#pragma once
#include <string>

namespace ei::emu {
// "ok" if the kernel computed what a GPU would, otherwise what differs. Throws what a launch
// throws.
std::string selftest(const std::string& name);
}  // namespace ei::emu
