// Checks and binding of attention_decode.
#include "attention_decode.h"

#include "cpu/attention_sizes.h"
#include "host/attention_checks.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void attention_decode_entry(const TensorArg& q, const TensorArg& k_pages, const TensorArg& v_pages,
                            const TensorArg& out, const TensorArg& page_table,
                            const TensorArg& lengths, double scale, const TensorArg& seq_width,
                            const TensorArg& q_sizes, double k_scale, double v_scale,
                            const py::object& run) {
  Checker check("attention_decode");
  const Runner runner = runner_from(run);
  const bool live = !runner.step;
  const int64_t Hq = check_heads(check, q, k_pages, v_pages, out, "S", scale, k_scale, v_scale);
  check(page_table, "page_table").dtype({DType::i32}).shape({"S", "P"}).rows_dense();
  check(lengths, "lengths").dtype({DType::i32}).shape({"S"}).contiguous();
  WidthCheck widths(check, seq_width, live, "seq_width", "S");
  widths.sizes(q_sizes, "q_sizes", Hq, 1);
  if (live && !q.cuda)
    for (int64_t s = 0; s < check["S"]; ++s)
      check_pages(check, page_table, s, lengths.ptr<int32_t>()[s], "lengths");

  const int threads = live ? runner.pool->threads() : runner.step->pool().threads();
  const int64_t K = check["K"], group = Hq / check["Hkv"];
  const int64_t splits = (check["P"] + kSplitPages - 1) / kSplitPages;
  const int64_t kept = threads > 1 ? (splits + threads - 1) / threads * check["Hkv"] : 0;
  submit(runner, attention_decode_cpu,
         AttentionDecodeArgs{q, k_pages, v_pages, out, page_table, lengths, seq_width, q_sizes,
                             static_cast<float>(scale), static_cast<float>(k_scale),
                             static_cast<float>(v_scale)},
         {&q, &k_pages, &v_pages, &out, &page_table, &lengths, &seq_width, &q_sizes},
         4 * (attention_floats(group, K) + (1 + kept) * partial_floats(group, K)));
}

const RegisterOp registered([](py::module_& m) {
  m.def("attention_decode", attention_decode_entry, py::arg("q"), py::arg("k_pages"),
        py::arg("v_pages"), py::arg("out"), py::arg("page_table"), py::arg("lengths"),
        py::arg("scale"), py::arg("seq_width"), py::arg("q_sizes"), py::arg("k_scale"),
        py::arg("v_scale"), py::arg("run"));
});

}  // namespace
}  // namespace ei
