// Checks and binding of rms_norm.
#include "rms_norm.h"

#include "host/check.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void rms_norm_entry(const TensorArg& residual, const TensorArg& weight, const TensorArg& out,
                    double eps, const TensorArg& delta, const TensorArg& row_width,
                    const TensorArg& sizes, const py::object& run) {
  Checker check("rms_norm");
  const Runner runner = runner_from(run);
  check(residual, "residual").dtype({DType::f32, DType::bf16}).shape({"R", "D"}).rows_dense();
  check(weight, "weight").dtype({DType::f32, DType::bf16}).shape({"D"}).contiguous();
  check(out, "out").dtype({residual.dtype}).shape({"R", "D"}).rows_dense();
  if (delta) check(delta, "delta").dtype({residual.dtype}).shape({"R", "D"}).rows_dense();
  check.range(check["D"], "D", 16, INT32_MAX);
  check.range(check["D"] % 16, "D modulo 16", 0, 0);
  if (!(eps >= 0)) check.fail("eps", "be at least 0", std::to_string(eps));
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(sizes, "sizes", check["D"], 16);
  submit(runner, rms_norm_cpu,
         RmsNormArgs{residual, delta, weight, out, row_width, sizes, static_cast<float>(eps)},
         {&residual, &weight, &out, &delta, &row_width, &sizes});
}

const RegisterOp registered([](py::module_& m) {
  m.def("rms_norm", rms_norm_entry, py::arg("residual"), py::arg("weight"), py::arg("out"),
        py::arg("eps"), py::arg("delta"), py::arg("row_width"), py::arg("sizes"), py::arg("run"));
});

}  // namespace
}  // namespace ei
