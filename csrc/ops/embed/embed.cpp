// Checks and binding of embed.
#include "embed.h"

#include "../../core/check.h"
#include "../../core/step.h"
#include "../../core/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

void embed_entry(const TensorArg& ids, const TensorArg& table, const TensorArg& out,
                 const TensorArg& row_width, const TensorArg& sizes, const py::object& run) {
  Checker check("embed");
  const Runner runner = runner_from(run);
  check(ids, "ids").dtype({DType::i32}).shape({"R"}).contiguous();
  check(table, "table").dtype({DType::f32, DType::bf16}).shape({"V", "D"}).rows_dense();
  check(out, "out").dtype({table.dtype}).shape({"R", "D"}).rows_dense();
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(sizes, "sizes", check["D"], 16);
  if (!runner.step && !ids.cuda)
    for (int64_t r = 0; r < check["R"]; ++r) {
      const int32_t id = ids.ptr<int32_t>()[r];
      if (id < 0 || id >= check["V"])
        check.fail("ids", "hold indices in [0, " + std::to_string(check["V"]) + ")",
                   std::to_string(id) + " at row " + std::to_string(r));
    }
  submit(runner, embed_cpu, EmbedArgs{ids, table, out, row_width, sizes},
         {&ids, &table, &out, &row_width, &sizes});
}

const RegisterOp registered([](py::module_& m) {
  m.def("embed", embed_entry, py::arg("ids"), py::arg("table"), py::arg("out"),
        py::arg("row_width"), py::arg("sizes"), py::arg("run"));
});

}  // namespace
}  // namespace ei
