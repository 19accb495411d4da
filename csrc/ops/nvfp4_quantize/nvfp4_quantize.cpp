// Checks and binding of nvfp4_quantize.
#include "nvfp4_quantize.h"

#include <cmath>

#include "host/check.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

void nvfp4_quantize_entry(const TensorArg& weight, const TensorArg& codes,
                          const TensorArg& block_scales, double scale, const py::object& run) {
  Checker check("nvfp4_quantize");
  check(weight, "weight").dtype({DType::f32, DType::bf16}).shape({"N", "K"}).rows_dense();
  const int64_t K = check["K"];
  check.range(K % 16, "K modulo 16", 0, 0);
  check(codes, "codes").dtype({DType::u8}).shape({"N", K / 2}).rows_dense();
  check(block_scales, "block_scales").dtype({DType::u8}).shape({"N", K / 16}).rows_dense();
  const float g = static_cast<float>(scale);
  if (!std::isfinite(g) || g <= 0)
    check.fail("scale", "be positive and finite in float32", std::to_string(scale));
  submit(runner_from(run), nvfp4_quantize_cpu, Nvfp4QuantizeArgs{weight, codes, block_scales, g},
         {&weight, &codes, &block_scales}, K * 4);
}

const RegisterOp registered([](py::module_& m) {
  m.def("nvfp4_quantize", nvfp4_quantize_entry, py::arg("weight"), py::arg("codes"),
        py::arg("block_scales"), py::arg("scale"), py::arg("run"));
});

}  // namespace
}  // namespace ei
