// What both Python modules (`_C`, and the tests' `_emu`) offer beside the ops.
#pragma once
#include <pybind11/pybind11.h>

namespace ei {

// Binds Pool, Step, what this build can do, and every op.
void bind_runtime(pybind11::module_& m);

}  // namespace ei
