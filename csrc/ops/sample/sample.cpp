// Checks and binding of sample.
#include "sample.h"

#include <algorithm>
#include <cmath>

#include "host/check.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

// Every value of a row's parameter obeys `valid`.
template <class T, class F>
void check_values(const Checker& check, const Tensor& t, const char* name, const char* rule,
                  F valid) {
  for (int64_t r = 0; r < t.shape[0]; ++r)
    if (!valid(t.ptr<T>()[r]))
      check.fail(name, rule, std::to_string(t.ptr<T>()[r]) + " at row " + std::to_string(r));
}

void sample_entry(const TensorArg& logits, const TensorArg& ids, const TensorArg& temperature,
                  const TensorArg& top_k, const TensorArg& top_p, const TensorArg& min_p,
                  const TensorArg& seed, const TensorArg& position, const py::object& run) {
  Checker check("sample");
  const Runner runner = runner_from(run);
  check(logits, "logits").dtype({DType::f32}).shape({"R", "V"}).rows_dense();
  const int64_t V = check["V"];
  check.range(V, "vocabulary size V", 1, INT32_MAX);
  check(ids, "ids").dtype({DType::i32}).shape({"R"}).contiguous();
  check(temperature, "temperature").dtype({DType::f32}).shape({"R"}).contiguous();
  check(top_k, "top_k").dtype({DType::i32}).shape({"R"}).contiguous();
  check(top_p, "top_p").dtype({DType::f32}).shape({"R"}).contiguous();
  check(min_p, "min_p").dtype({DType::f32}).shape({"R"}).contiguous();
  check(seed, "seed").dtype({DType::i64}).shape({"R"}).contiguous();
  check(position, "position").dtype({DType::i64}).shape({"R"}).contiguous();
  if (!runner.step && !logits.cuda) {
    check_values<float>(check, temperature, "temperature", "hold finite values >= 0",
                        [](float x) { return std::isfinite(x) && x >= 0; });
    check_values<int32_t>(check, top_k, "top_k", "hold values >= -1",
                          [](int32_t x) { return x >= -1; });
    check_values<float>(check, top_p, "top_p", "hold values in (0, 1]",
                        [](float x) { return x > 0 && x <= 1; });
    check_values<float>(check, min_p, "min_p", "hold values in [0, 1]",
                        [](float x) { return x >= 0 && x <= 1; });
  }
  submit(runner, sample_cpu,
         SampleArgs{logits, ids, temperature, top_k, top_p, min_p, seed, position},
         {&logits, &ids, &temperature, &top_k, &top_p, &min_p, &seed, &position},
         sample_scratch_bytes(V));
}

const RegisterOp registered([](py::module_& m) {
  m.def("sample", sample_entry, py::arg("logits"), py::arg("ids"), py::arg("temperature"),
        py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"), py::arg("position"),
        py::arg("run"));
});

}  // namespace
}  // namespace ei
