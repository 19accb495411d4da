#include "host/isa.h"

#include <stdexcept>

namespace ei {

bool isa_usable(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

Isa best_isa() {
  if (isa_usable(Isa::avx512)) return Isa::avx512;
  if (isa_usable(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

const char* isa_name(Isa isa) {
  constexpr const char* names[kIsaCount] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

Isa isa_from_name(const std::string& name) {
  if (name == "auto") return best_isa();
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name != isa_name(isa)) continue;
    if (!isa_usable(isa))
      throw std::invalid_argument("pool: isa must be one that this processor has (auto picks " +
                                  std::string(isa_name(best_isa())) + "), got " + name);
    return isa;
  }
  throw std::invalid_argument("pool: isa must be auto, portable, avx2 or avx512, got " + name);
}

}  // namespace ei
