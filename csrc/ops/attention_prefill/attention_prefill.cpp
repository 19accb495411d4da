// Checks and binding of attention_prefill.
#include "attention_prefill.h"

#include "cpu/attention_sizes.h"
#include "host/attention_checks.h"
#include "host/segments.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void attention_prefill_entry(const TensorArg& q, const TensorArg& k_pages, const TensorArg& v_pages,
                             const TensorArg& out, const TensorArg& page_table,
                             const TensorArg& cu_seqlens, const TensorArg& context, double scale,
                             const TensorArg& seq_width, const TensorArg& q_sizes, double k_scale,
                             double v_scale, const py::object& run) {
  Checker check("attention_prefill");
  const Runner runner = runner_from(run);
  const bool live = !runner.step;
  const int64_t Hq = check_heads(check, q, k_pages, v_pages, out, "T", scale, k_scale, v_scale);
  check(page_table, "page_table").dtype({DType::i32}).shape({"S", "P"}).rows_dense();
  check_segments(check, cu_seqlens, live);
  check(context, "context").dtype({DType::i32}).shape({"S"}).contiguous();
  WidthCheck widths(check, seq_width, live, "seq_width", "S");
  widths.sizes(q_sizes, "q_sizes", Hq, 1);
  if (live && !q.cuda)
    for (int64_t s = 0; s < check["S"]; ++s) {
      const int64_t before = context.ptr<int32_t>()[s];
      const auto* cu = cu_seqlens.ptr<int32_t>() + s;
      if (before < 0)
        check.fail("context", "be at least 0",
                   std::to_string(before) + " at sequence " + std::to_string(s));
      if (cu[1] > cu[0]) check_pages(check, page_table, s, before + cu[1] - cu[0], "context");
    }

  const int64_t K = check["K"], group = Hq / check["Hkv"];
  submit(runner, attention_prefill_cpu,
         AttentionPrefillArgs{q, k_pages, v_pages, out, page_table, cu_seqlens, context, seq_width,
                              q_sizes, static_cast<float>(scale), static_cast<float>(k_scale),
                              static_cast<float>(v_scale)},
         {&q, &k_pages, &v_pages, &out, &page_table, &cu_seqlens, &context, &seq_width, &q_sizes},
         4 * attention_floats(prefill_tokens(group) * group, K));
}

const RegisterOp registered([](py::module_& m) {
  m.def("attention_prefill", attention_prefill_entry, py::arg("q"), py::arg("k_pages"),
        py::arg("v_pages"), py::arg("out"), py::arg("page_table"), py::arg("cu_seqlens"),
        py::arg("context"), py::arg("scale"), py::arg("seq_width"), py::arg("q_sizes"),
        py::arg("k_scale"), py::arg("v_scale"), py::arg("run"));
});

}  // namespace
}  // namespace ei
