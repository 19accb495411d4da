// Checks and binding of embed.
#include "embed.h"

#include "host/check.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {

std::string embed_problem(const EmbedArgs& a, int64_t r) {
  const auto outside = [r](const char* name, int64_t low, int64_t high, int32_t value) {
    if (value >= low && value < high) return std::string();
    return std::string(name) + " must hold indices in [" + std::to_string(low) + ", " +
           std::to_string(high) + "), got " + std::to_string(value) + " at row " +
           std::to_string(r);
  };
  const int32_t from = a.feed ? a.feed.ptr<int32_t>()[r] : -1;
  if (a.feed) {
    const std::string problem = outside("feed", -1, a.drawn.shape[0], from);
    if (!problem.empty()) return problem;
  }
  if (from >= 0) return outside("drawn", -1, a.table.shape[0], embed_id(a, r));
  return outside("ids", 0, a.table.shape[0], embed_id(a, r));
}

namespace {

void embed_entry(const TensorArg& ids, const TensorArg& table, const TensorArg& out,
                 const TensorArg& row_width, const TensorArg& sizes, const TensorArg& drawn,
                 const TensorArg& feed, const py::object& run) {
  Checker check("embed");
  const Runner runner = runner_from(run);
  check(ids, "ids").dtype({DType::i32}).shape({"R"}).contiguous();
  check(table, "table").dtype({DType::f32, DType::bf16}).shape({"V", "D"}).rows_dense();
  check(out, "out").dtype({table.dtype}).shape({"R", "D"}).rows_dense();
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(sizes, "sizes", check["D"], 16);
  if (drawn.given != feed.given)
    check.fail("feed", drawn ? "be given with drawn" : "be absent without drawn", feed.describe());
  if (drawn) {
    check(drawn, "drawn").dtype({DType::i32}).shape({"N"}).contiguous();
    check(feed, "feed").dtype({DType::i32}).shape({"R"}).contiguous();
  }
  const EmbedArgs args{ids, table, out, row_width, sizes, drawn, feed};
  if (!runner.step && !ids.cuda)
    for (int64_t r = 0; r < check["R"]; ++r) {
      const std::string problem = embed_problem(args, r);
      if (!problem.empty()) throw std::invalid_argument("embed: " + problem);
    }
  submit(runner, embed_cpu, args, {&ids, &table, &out, &row_width, &sizes, &drawn, &feed});
}

const RegisterOp registered([](py::module_& m) {
  m.def("embed", embed_entry, py::arg("ids"), py::arg("table"), py::arg("out"),
        py::arg("row_width"), py::arg("sizes"), py::arg("drawn"), py::arg("feed"), py::arg("run"));
});

}  // namespace
}  // namespace ei
