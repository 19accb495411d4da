// Checks and binding of softmax_stats.
#include "softmax_stats.h"

#include <cmath>

#include "host/check.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

void softmax_stats_entry(const TensorArg& logits, const TensorArg& temperature,
                         const TensorArg& log_sum, const TensorArg& entropy,
                         const py::object& run) {
  Checker check("softmax_stats");
  const Runner runner = runner_from(run);
  check(logits, "logits").dtype({DType::f32}).shape({"R", "V"}).rows_dense();
  check.range(check["V"], "vocabulary size V", 1, INT32_MAX);
  check(temperature, "temperature").dtype({DType::f32}).shape({"R"}).contiguous();
  check(log_sum, "log_sum").dtype({DType::f32}).shape({"R"}).contiguous();
  check(entropy, "entropy").dtype({DType::f32}).shape({"R"}).contiguous();
  if (!runner.step && !logits.cuda)
    for (int64_t r = 0; r < check["R"]; ++r) {
      const float t = temperature.ptr<float>()[r];
      if (!std::isfinite(t) || t <= 0)
        check.fail("temperature", "hold finite values > 0",
                   std::to_string(t) + " at row " + std::to_string(r));
    }
  submit(runner, softmax_stats_cpu, SoftmaxStatsArgs{logits, temperature, log_sum, entropy},
         {&logits, &temperature, &log_sum, &entropy});
}

const RegisterOp registered([](py::module_& m) {
  m.def("softmax_stats", softmax_stats_entry, py::arg("logits"), py::arg("temperature"),
        py::arg("log_sum"), py::arg("entropy"), py::arg("run"));
});

}  // namespace
}  // namespace ei
