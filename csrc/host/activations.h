// Forms that activations may take on their way into a product with NVFP4 weights, on request: what
// can be wished for, and the refusals.
#pragma once
#include <string>

#include "host/caster.h"
#include "host/check.h"
#include "host/native.h"

namespace ei {

// none: as they are. int8: on the CPU (gemm_int8.h). nvfp4: on GPUs of compute capability 12.x.
enum class Activations { none, int8, nvfp4 };

// The form that `wish` names. Refuses what the weights or the device of x cannot do.
inline Activations activations_from(const Checker& check, const TensorArg& x, DType w_dtype,
                                    const std::string& wish) {
  constexpr const char* kName = "activation_quantization";
  if (wish == "none") return Activations::none;
  if (wish != "int8" && wish != "nvfp4") check.fail(kName, "be none, int8 or nvfp4", wish);
  if (w_dtype != DType::nvfp4)
    check.fail(kName, std::string("be none for a ") + dtype_name(w_dtype) + " image", wish);
  if (wish == "int8") {
    if (device::holds(x)) check.fail(kName, "be none or nvfp4 on a GPU", wish);
    return Activations::int8;
  }
  if (!device::holds(x))
    check.fail(kName, "be none or int8 on the CPU: compute capability 12.x needed", wish);
  const std::string why = lacks_capability(x.device_id, 120, true);
  if (!why.empty()) check.fail(kName, "be none: " + why, wish);
  return Activations::nvfp4;
}

}  // namespace ei
