// Binding of ssm_step; its checks are in host/ssm.cpp.
#include "ssm_step.h"

#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

void ssm_step_entry(const TensorArg& x, const TensorArg& B, const TensorArg& C, const TensorArg& dt,
                    const TensorArg& A_log, const TensorArg& D, const TensorArg& dt_bias,
                    const TensorArg& state, const TensorArg& y, const TensorArg& slots,
                    const TensorArg& seq_width, const TensorArg& h_sizes, const TensorArg& context,
                    int seed, const py::object& run) {
  const Runner runner = runner_from(run);
  SsmArgs a{x, B,        C,     dt,        A_log,   D, dt_bias, state,
            y, Tensor{}, slots, seq_width, h_sizes, 0, context, seed};
  check_ssm("ssm_step", a, false, !runner.step);
  submit(
      runner, ssm_step_cpu, a,
      {&x, &B, &C, &dt, &A_log, &D, &dt_bias, &state, &y, &slots, &seq_width, &h_sizes, &context});
}

const RegisterOp registered([](py::module_& m) {
  m.def("ssm_step", ssm_step_entry, py::arg("x"), py::arg("B"), py::arg("C"), py::arg("dt"),
        py::arg("A_log"), py::arg("D"), py::arg("dt_bias"), py::arg("state"), py::arg("y"),
        py::arg("slots"), py::arg("seq_width"), py::arg("h_sizes"), py::arg("context"),
        py::arg("seed"), py::arg("run"));
});

}  // namespace
}  // namespace ei
