// Checks and binding of mamba_step; those of the recurrence are in host/ssm.cpp.
#include "mamba_step.h"

#include "host/check.h"
#include "host/segments.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

// Columns [first, first + n) of a matrix.
Tensor columns(Tensor t, int64_t first, int64_t n) {
  t.data = static_cast<char*>(t.data) + first * dtype_size(t.dtype);
  t.shape[1] = n;
  return t;
}

// What ssm_step is given; binds S, H*P and C.
SsmArgs recurrence(Checker& check, const Tensor& xbc, const Tensor& state, const Tensor& out) {
  check(state, "state").dtype({DType::f32, DType::f16}).shape({"slots", "H", "P", "N"});
  check.range(check["N"], "N", 16, 256);
  const int64_t channels = check["H"] * check["P"];
  check.bind("H*P", channels);
  check(xbc, "xbc").dtype({DType::f32, DType::bf16}).shape({"S", "C"}).rows_dense();
  const int64_t rest = check["C"] - channels, bc = rest / 2, groups = bc / check["N"];
  if (groups < 1 || rest != 2 * groups * check["N"] || check["H"] % groups != 0)
    check.fail("xbc",
               "have " + std::to_string(channels) + " + 2 * groups * " +
                   std::to_string(check["N"]) + " columns, where groups divides " +
                   std::to_string(check["H"]) + " heads",
               xbc.describe());
  check(out, "out").dtype({xbc.dtype}).shape({"S", "H*P"}).rows_dense();
  SsmArgs m{};
  m.x = columns(xbc, 0, channels);
  m.B = columns(xbc, channels, bc);
  m.C = columns(xbc, channels + bc, bc);
  m.state = state;
  m.y = out;
  return m;
}

void check_rest(Checker& check, const MambaStepArgs& a, bool live) {
  const DType dtype = a.ssm.x.dtype;
  check(a.z, "z").dtype({dtype}).shape({"S", "H*P"}).rows_dense();
  check(a.conv_weight, "conv_weight").dtype({DType::f32, dtype}).shape({"C", 4}).contiguous();
  check(a.conv_bias, "conv_bias").dtype({a.conv_weight.dtype}).shape({"C"}).contiguous();
  check(a.conv_state, "conv_state").dtype({dtype}).shape({"slots", "C", 3});
  check_pool(check, a.conv_state, "conv_state");
  check(a.norm_weight, "norm_weight").dtype({DType::f32, DType::bf16}).shape({"H*P"}).contiguous();
  check(a.arrivals, "arrivals").dtype({DType::i32}).shape({"S", a.ssm.groups}).contiguous();
  if (!(a.eps >= 0)) check.fail("eps", "be at least 0", std::to_string(a.eps));
  WidthCheck widths(check, a.ssm.seq_width, live, "seq_width", "S");
  widths.sizes(a.ssm.h_sizes, "h_sizes", check["H"], a.ssm.groups);
  widths.sizes(a.out_sizes, "out_sizes", check["H"], a.ssm.groups);
  if (!live || !a.out_sizes || a.out_sizes.cuda) return;
  for (int64_t w = 0; w < a.out_sizes.shape[0]; ++w)
    if (a.out_sizes.ptr<int32_t>()[w] > a.ssm.h_sizes.ptr<int32_t>()[w])
      check.fail("out_sizes", "be at most h_sizes",
                 std::to_string(a.out_sizes.ptr<int32_t>()[w]) + " at width " + std::to_string(w));
}

void mamba_step_entry(const TensorArg& z, const TensorArg& xbc, const TensorArg& dt,
                      const TensorArg& conv_weight, const TensorArg& conv_bias,
                      const TensorArg& conv_state, const TensorArg& A_log, const TensorArg& D,
                      const TensorArg& dt_bias, const TensorArg& state,
                      const TensorArg& norm_weight, const TensorArg& out, const TensorArg& arrivals,
                      const TensorArg& slots, double eps, const TensorArg& seq_width,
                      const TensorArg& h_sizes, const TensorArg& out_sizes,
                      const TensorArg& context, int seed, const py::object& run) {
  Checker check("mamba_step");
  const Runner runner = runner_from(run);
  const bool live = !runner.step;
  MambaStepArgs a{};
  a.ssm = recurrence(check, xbc, state, out);
  a.ssm.dt = dt, a.ssm.A_log = A_log, a.ssm.D = D, a.ssm.dt_bias = dt_bias;
  a.ssm.slots = slots, a.ssm.seq_width = seq_width, a.ssm.h_sizes = h_sizes;
  a.ssm.context = context, a.ssm.seed = seed;
  check_ssm("mamba_step", a.ssm, false, live);
  a.z = z, a.conv_weight = conv_weight, a.conv_bias = conv_bias, a.conv_state = conv_state;
  a.norm_weight = norm_weight, a.out_sizes = out_sizes, a.arrivals = arrivals;
  a.eps = static_cast<float>(eps);
  check_rest(check, a, live);
  const int64_t channels = check["H*P"], G = a.ssm.groups;
  submit(runner, mamba_step_cpu, a,
         {&xbc, &z, &dt, &conv_weight, &conv_bias, &conv_state, &A_log, &D, &dt_bias, &state,
          &norm_weight, &out, &arrivals, &slots, &seq_width, &h_sizes, &out_sizes, &context},
         (check["C"] + channels + channels / G) * 4);
}

const RegisterOp registered([](py::module_& m) {
  m.def("mamba_step", mamba_step_entry, py::arg("z"), py::arg("xbc"), py::arg("dt"),
        py::arg("conv_weight"), py::arg("conv_bias"), py::arg("conv_state"), py::arg("A_log"),
        py::arg("D"), py::arg("dt_bias"), py::arg("state"), py::arg("norm_weight"), py::arg("out"),
        py::arg("arrivals"), py::arg("slots"), py::arg("eps"), py::arg("seq_width"),
        py::arg("h_sizes"), py::arg("out_sizes"), py::arg("context"), py::arg("seed"),
        py::arg("run"));
});

}  // namespace
}  // namespace ei
