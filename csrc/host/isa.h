// Instruction sets that CPU kernels are compiled for. Every `<op>_cpu.cpp` is compiled once for
// each, inside a namespace of that name; the pool's choice picks one at run time.
#pragma once
#include <string>

namespace ei {

class Pool;

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };
constexpr int kIsaCount = 3;

// The best one that was compiled in and that this processor has.
Isa best_isa();
// "auto", "portable", "avx2" or "avx512"; refuses what this processor or build lacks.
Isa isa_from_name(const std::string& name);
const char* isa_name(Isa isa);
bool isa_usable(Isa isa);

// One kernel in its compiled variants.
template <class Args>
struct CpuKernel {
  const char* name;
  void (*variant[kIsaCount])(const Args&, Pool&);
};

#if defined(ELASTIC_EMULATE)
// The emulator's module (csrc/emu) needs the names alone.
#define EI_CPU_KERNEL(op, Args) \
  inline constexpr CpuKernel<Args> op##_cpu{#op, {nullptr, nullptr, nullptr}};
#elif defined(__x86_64__)
#define EI_CPU_KERNEL(op, Args) \
  namespace portable {          \
  void op(const Args&, Pool&);  \
  }                             \
  namespace avx2 {              \
  void op(const Args&, Pool&);  \
  }                             \
  namespace avx512 {            \
  void op(const Args&, Pool&);  \
  }                             \
  inline constexpr CpuKernel<Args> op##_cpu{#op, {portable::op, avx2::op, avx512::op}};
#else
#define EI_CPU_KERNEL(op, Args) \
  namespace portable {          \
  void op(const Args&, Pool&);  \
  }                             \
  inline constexpr CpuKernel<Args> op##_cpu{#op, {portable::op, nullptr, nullptr}};
#endif

}  // namespace ei
