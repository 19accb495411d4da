// Checks and binding of moe_route.
#include "moe_route.h"

#include <cmath>

#include "host/check.h"
#include "host/image.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void moe_route_entry(const TensorArg& x, const TensorArg& gate, int64_t E, int64_t D,
                     const TensorArg& bias, const TensorArg& ids, const TensorArg& weights,
                     double scaling_factor, const TensorArg& row_width, const TensorArg& k_sizes,
                     const TensorArg& e_sizes, const py::object& run) {
  Checker check("moe_route");
  const Runner runner = runner_from(run);
  check.bind("E", E);  // the gate's rows and columns
  check.bind("D", D);
  check(x, "x").dtype({DType::f32, DType::bf16}).shape({"R", "D"}).rows_dense();
  check(bias, "bias").dtype({DType::f32}).shape({"E"}).contiguous();
  check(gate, "gate")
      .dtype({DType::u8})
      .shape({(E + 63) / 64, (D + 63) / 64, 64 * 64 * 4})
      .contiguous();
  check_image_start(check, gate, "gate");
  check(ids, "ids").dtype({DType::i32}).shape({"R", "J"}).rows_dense();
  check(weights, "weights").dtype({DType::f32}).shape({"R", "J"}).rows_dense();
  const int64_t J = check["J"];
  check.range(D % 16, "D modulo 16", 0, 0);
  check.range(E, "E", 1, INT32_MAX);
  check.range(J, "experts per row J", 1, E);
  if (!std::isfinite(scaling_factor))
    check.fail("scaling_factor", "be finite", std::to_string(scaling_factor));
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(k_sizes, "k_sizes", D, 16);
  widths.sizes(e_sizes, "e_sizes", E, 1);
  if (e_sizes && !runner.step && !e_sizes.cuda)
    for (int64_t w = 0; w < e_sizes.shape[0]; ++w)
      if (e_sizes.ptr<int32_t>()[w] < J)
        check.fail("e_sizes", "keep at least J = " + std::to_string(J) + " experts",
                   std::to_string(e_sizes.ptr<int32_t>()[w]));
  const int64_t rows = std::min<int64_t>(check["R"], 32), tiles = (D + 63) / 64;
  const int64_t padded = (E + 63) / 64 * 64;
  submit(runner, moe_route_cpu,
         MoeRouteArgs{x, gate, bias, ids, weights, row_width, k_sizes, e_sizes,
                      static_cast<float>(scaling_factor)},
         {&x, &gate, &bias, &ids, &weights, &row_width, &k_sizes, &e_sizes},
         tiles * rows * 64 * 6 + rows * 64 * 4 + 64 * 64 * 4 + rows * 4 + 512 +
             (rows + 1) * padded * 4);
}

const RegisterOp registered([](py::module_& m) {
  m.def("moe_route", moe_route_entry, py::arg("x"), py::arg("gate"), py::arg("E"), py::arg("D"),
        py::arg("bias"), py::arg("ids"), py::arg("weights"), py::arg("scaling_factor"),
        py::arg("row_width"), py::arg("k_sizes"), py::arg("e_sizes"), py::arg("run"));
});

}  // namespace
}  // namespace ei
