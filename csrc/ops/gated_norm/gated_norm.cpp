// Checks and binding of gated_norm.
#include "gated_norm.h"

#include "host/check.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void gated_norm_entry(const TensorArg& y, const TensorArg& z, const TensorArg& weight,
                      const TensorArg& out, int64_t groups, int64_t head_dim, double eps,
                      const TensorArg& row_width, const TensorArg& h_sizes, const py::object& run) {
  Checker check("gated_norm");
  const Runner runner = runner_from(run);
  check(y, "y").dtype({DType::f32, DType::bf16}).shape({"R", "H*P"}).rows_dense();
  check(z, "z").dtype({y.dtype}).shape({"R", "H*P"}).rows_dense();
  check(weight, "weight").dtype({DType::f32, DType::bf16}).shape({"H*P"}).contiguous();
  check(out, "out").dtype({y.dtype}).shape({"R", "H*P"}).rows_dense();
  const int64_t channels = check["H*P"];
  check.range(head_dim, "head_dim", 16, channels);
  check.range(head_dim % 16, "head_dim modulo 16", 0, 0);
  check.range(channels % head_dim, "H*P modulo head_dim", 0, 0);
  const int64_t H = channels / head_dim;
  check.range(groups, "groups", 1, H);
  check.range(H % groups, "H modulo groups", 0, 0);
  if (!(eps >= 0)) check.fail("eps", "be at least 0", std::to_string(eps));
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(h_sizes, "h_sizes", H, groups);
  submit(runner, gated_norm_cpu,
         GatedNormArgs{y, z, weight, out, row_width, h_sizes, static_cast<int>(groups),
                       static_cast<int>(head_dim), static_cast<float>(eps)},
         {&y, &z, &weight, &out, &row_width, &h_sizes}, channels / groups * 4);
}

const RegisterOp registered([](py::module_& m) {
  m.def("gated_norm", gated_norm_entry, py::arg("y"), py::arg("z"), py::arg("weight"),
        py::arg("out"), py::arg("groups"), py::arg("head_dim"), py::arg("eps"),
        py::arg("row_width"), py::arg("h_sizes"), py::arg("run"));
});

}  // namespace
}  // namespace ei
