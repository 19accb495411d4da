// Kernels for one kind of card, off unless asked for: whether the device at hand, and this build,
// have what they need.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "host/device.h"

namespace ei {

// Why device `index` cannot run kernels of compute capability `wanted` (major * 10 + minor) or, as
// a family, of its major number; empty if it can.
inline std::string lacks_capability(int index, int wanted, bool family) {
  const std::string needed = std::to_string(wanted / 10) + (family ? ".x" : ".0");
  if (!device::built()) return "this build has no CUDA kernels, capability " + needed + " needed";
  const int found = device::call_on(index).compute_capability;
  const bool fits = family ? found / 10 == wanted / 10 : found == wanted;
  if (!fits)
    return "the device has compute capability " + std::to_string(found / 10) + "." +
           std::to_string(found % 10) + ", " + needed + " needed";
  const std::vector<std::string> archs = device::architectures();
  const bool compiled = std::any_of(archs.begin(), archs.end(), [&](const std::string& arch) {
    return arch == "emulated" || arch == std::to_string(found) + "a" ||
           (family && arch == std::to_string(wanted) + "f");
  });
  return compiled ? "" : "this build has no kernels for compute capability " + needed;
}

}  // namespace ei
