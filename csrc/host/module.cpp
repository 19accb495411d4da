// The one Python module of native code. Ops register themselves (RegisterOp in `<op>.cpp`).
#include "host/runtime.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels and host objects of elastic_infer.";
  ei::bind_runtime(m);
}
