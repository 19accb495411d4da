// Checks and binding of fp8_quantize.
#include "fp8_quantize.h"

#include <cmath>

#include "host/check.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

void fp8_quantize_entry(const TensorArg& weight, const TensorArg& codes, double scale,
                        const py::object& run) {
  Checker check("fp8_quantize");
  check(weight, "weight").dtype({DType::f32, DType::bf16}).shape({"N", "K"}).rows_dense();
  check(codes, "codes").dtype({DType::u8}).shape({"N", "K"}).rows_dense();
  const float s = static_cast<float>(scale);
  if (!std::isfinite(s) || s <= 0)
    check.fail("scale", "be positive and finite in float32", std::to_string(scale));
  submit(runner_from(run), fp8_quantize_cpu, Fp8QuantizeArgs{weight, codes, s}, {&weight, &codes},
         check["K"] * 4);
}

const RegisterOp registered([](py::module_& m) {
  m.def("fp8_quantize", fp8_quantize_entry, py::arg("weight"), py::arg("codes"), py::arg("scale"),
        py::arg("run"));
});

}  // namespace
}  // namespace ei
