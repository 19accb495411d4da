// Checks and binding of matmul and matmul_pack.
#include "matmul.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "../../core/check.h"
#include "../../core/step.h"
#include "../../core/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

using Segment = std::array<int64_t, 3>;  // tile row, output column, rows

// The weight type of an image, from the bytes of its tiles.
DType image_dtype(Checker& check, const Tensor& w, const char* name) {
  const int64_t bytes = w.ndim ? w.shape[w.ndim - 1] : 0;
  if (bytes == 64 * 64 * 2) return DType::bf16;
  if (bytes == 64 * 64 * 4) return DType::f32;
  check.fail(name, "have tiles of 8192 (bfloat16) or 16384 (float32) bytes", w.describe());
}

void matmul_entry(const TensorArg& x, const TensorArg& w, int64_t K, const TensorArg& out,
                  const std::vector<Segment>& segments, const std::string& activation,
                  const TensorArg& row_width, const TensorArg& k_sizes, const TensorArg& n_sizes,
                  const py::object& run) {
  Checker check("matmul");
  const Runner runner = runner_from(run);
  check.bind("K", K);  // the weight's columns
  check(x, "x").dtype({DType::f32, DType::bf16}).shape({"R", "K"}).rows_dense();
  check(w, "w").dtype({DType::u8}).shape({"N tiles", (K + 63) / 64, "tile bytes"}).contiguous();
  int64_t N = 0;
  for (const auto& [tile_row, column, rows] : segments) N = std::max(N, column + rows);
  check.bind("N", N);
  check(out, "out").dtype({DType::f32, DType::bf16}).shape({"R", "N"}).rows_dense();
  check.range(K % 16, "K modulo 16", 0, 0);

  MatmulArgs a{x,       w,         image_dtype(check, w, "w"),
               out,     row_width, k_sizes,
               n_sizes, 0,         {},
               {},      {},        Activation::none};
  if (a.w_dtype == DType::f32 && x.dtype != DType::f32)
    check.fail("w", "be a bfloat16 image when x is bfloat16", "a float32 image");
  if (activation == "relu2")
    a.activation = Activation::relu2;
  else if (activation != "none")
    check.fail("activation", "be none or relu2", activation);
  if (segments.empty() || segments.size() > kMaxSegments)
    check.fail("segments", "hold 1 to 8 segments", std::to_string(segments.size()));
  int64_t largest[kMaxSegments];
  for (const Segment& s : segments) {
    const auto [tile_row, column, rows] = s;
    check.range(rows, "segment rows", 1, check["N"]);
    check.range(column, "segment column", 0, check["N"] - rows);
    check.range(tile_row, "segment tile row", 0, check["N tiles"] - (rows + 63) / 64);
    largest[a.segments] = rows;
    a.tile_row[a.segments] = static_cast<int>(tile_row);
    a.column[a.segments] = static_cast<int>(column);
    a.rows[a.segments++] = static_cast<int>(rows);
  }
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(k_sizes, "k_sizes", K, 16);
  widths.sizes(n_sizes, "n_sizes", largest, a.segments, 1);
  const int64_t rows = std::min<int64_t>(check["R"], 256), tiles = (K + 63) / 64;
  submit(runner, matmul_cpu, a, {&x, &w, &out, &row_width, &k_sizes, &n_sizes},
         tiles * rows * 64 * 6 + rows * 64 * 4 + 64 * 64 * 4 + rows * 4 + 512);
}

void pack_entry(const TensorArg& source, const TensorArg& image, int64_t tile_row,
                const py::object& run) {
  Checker check("matmul_pack");
  check(source, "source").dtype({DType::f32, DType::bf16}).shape({"N", "K"}).rows_dense();
  check(image, "image").dtype({DType::u8}).shape({"N tiles", "K tiles", "tile bytes"}).contiguous();
  const DType dtype = image_dtype(check, image, "image");
  check.range((check["K"] + 63) / 64, "K tiles of source", 0, check["K tiles"]);
  check.range(tile_row, "tile_row", 0, check["N tiles"] - (check["N"] + 63) / 64);
  submit(runner_from(run), matmul_pack_cpu,
         PackArgs{source, image, dtype, static_cast<int>(tile_row)}, {&source, &image});
}

const RegisterOp registered([](py::module_& m) {
  m.def("matmul", matmul_entry, py::arg("x"), py::arg("w"), py::arg("K"), py::arg("out"),
        py::arg("segments"), py::arg("activation"), py::arg("row_width"), py::arg("k_sizes"),
        py::arg("n_sizes"), py::arg("run"));
  m.def("matmul_pack", pack_entry, py::arg("source"), py::arg("image"), py::arg("tile_row"),
        py::arg("run"));
});

}  // namespace
}  // namespace ei
