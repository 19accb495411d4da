// Checks and binding of causal_conv.
#include "causal_conv.h"

#include "host/check.h"
#include "host/segments.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void causal_conv_entry(const TensorArg& x, const TensorArg& weight, const TensorArg& bias,
                       const TensorArg& state, const TensorArg& out, const TensorArg& cu_seqlens,
                       const TensorArg& slots, int64_t x_channels, const TensorArg& seq_width,
                       const TensorArg& x_sizes, const py::object& run) {
  Checker check("causal_conv");
  const Runner runner = runner_from(run);
  check(x, "x").dtype({DType::f32, DType::bf16}).shape({"T", "C"}).rows_dense();
  const int64_t C = check["C"];
  check.range(C % 16, "C modulo 16", 0, 0);
  check(weight, "weight").dtype({DType::f32, x.dtype}).shape({C, 4}).contiguous();
  check(bias, "bias").dtype({weight.dtype}).shape({C}).contiguous();
  check(state, "state").dtype({x.dtype}).shape({"slots", C, 3});
  check_pool(check, state, "state");
  check(out, "out").dtype({x.dtype}).shape({"T", "C"}).rows_dense();
  if (out.data == x.data && x.numel() > 0)
    check.fail("out", "not share memory with x", "the same address");
  check.range(x_channels, "x_channels", 0, C);
  check.range(x_channels % 16, "x_channels modulo 16", 0, 0);
  const bool live = !runner.step;
  check_slots(check, slots, check["slots"], live);
  check_segments(check, cu_seqlens, live);
  WidthCheck widths(check, seq_width, live, "seq_width", "S");
  widths.sizes(x_sizes, "x_sizes", x_channels, 16);
  submit(runner, causal_conv_cpu,
         CausalConvArgs{x, weight, bias, state, out, cu_seqlens, slots, seq_width, x_sizes,
                        static_cast<int>(x_channels)},
         {&x, &weight, &bias, &state, &out, &cu_seqlens, &slots, &seq_width, &x_sizes});
}

const RegisterOp registered([](py::module_& m) {
  m.def("causal_conv", causal_conv_entry, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("state"), py::arg("out"), py::arg("cu_seqlens"), py::arg("slots"),
        py::arg("x_channels"), py::arg("seq_width"), py::arg("x_sizes"), py::arg("run"));
});

}  // namespace
}  // namespace ei
