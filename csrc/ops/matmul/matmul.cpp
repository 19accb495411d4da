// Checks and binding of matmul and matmul_pack.
#include "matmul.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "host/activations.h"
#include "host/check.h"
#include "host/image.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

using Segment = std::array<int64_t, 3>;  // tile row, output column, rows

// Refuses a kernel that the device or the operands do not allow. Whether one was wished.
bool by_warpgroups(const Checker& check, const TensorArg& x, DType w_dtype,
                   const std::string& kernel) {
  if (kernel == "auto") return false;
  if (kernel != "wgmma") check.fail("kernel", "be auto or wgmma", kernel);
  if (x.dtype != DType::bf16 || w_dtype != DType::bf16)
    check.fail("kernel", "be auto unless x and w are bfloat16", kernel);
  if (!device::holds(x))
    check.fail("kernel", "be auto on the CPU: compute capability 9.0 needed", kernel);
  const std::string why = lacks_capability(x.device_id, 90, false);
  if (!why.empty()) check.fail("kernel", "be auto: " + why, kernel);
  return true;
}

void matmul_entry(const TensorArg& x, const TensorArg& w, int64_t K, const TensorArg& scale,
                  const TensorArg& out, const std::vector<Segment>& segments,
                  const std::string& activation, const TensorArg& row_width,
                  const TensorArg& k_sizes, const TensorArg& n_sizes,
                  const std::string& activation_quantization, const std::string& kernel,
                  const py::object& run) {
  Checker check("matmul");
  const Runner runner = runner_from(run);
  check.bind("K", K);  // the weight's columns
  check(x, "x").dtype({DType::f32, DType::bf16}).shape({"R", "K"}).rows_dense();
  check(w, "w").dtype({DType::u8}).shape({"N tiles", (K + 63) / 64, "tile bytes"}).contiguous();
  int64_t N = 0;
  for (const auto& [tile_row, column, rows] : segments) {
    check.range(rows, "segment rows", 1, INT32_MAX);
    check.range(column, "segment column", 0, INT32_MAX);
    N = std::max(N, column + rows);
  }
  check.bind("N", N);
  check(out, "out").dtype({DType::f32, DType::bf16}).shape({"R", "N"}).rows_dense();
  check.range(K % 16, "K modulo 16", 0, 0);

  MatmulArgs a{};
  a.x = x, a.w = w, a.scale = scale, a.out = out;
  a.row_width = row_width, a.k_sizes = k_sizes, a.n_sizes = n_sizes;
  a.w_dtype = image_dtype(check, w, "w", x.dtype);
  if (activation == "relu2")
    a.activation = Activation::relu2;
  else if (activation != "none")
    check.fail("activation", "be none or relu2", activation);
  if (segments.empty() || segments.size() > kMaxSegments)
    check.fail("segments", "hold 1 to 8 segments", std::to_string(segments.size()));
  check_scale(check, scale, "scale", a.w_dtype, static_cast<int64_t>(segments.size()));
  int64_t largest[kMaxSegments];
  for (const Segment& s : segments) {
    const auto [tile_row, column, rows] = s;
    check.range(tile_row, "segment tile row", 0, check["N tiles"] - (rows + 63) / 64);
    largest[a.segments] = rows;
    a.tile_row[a.segments] = static_cast<int>(tile_row);
    a.column[a.segments] = static_cast<int>(column);
    a.rows[a.segments++] = static_cast<int>(rows);
  }
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(k_sizes, "k_sizes", K, 16);
  widths.sizes(n_sizes, "n_sizes", largest, a.segments, 1);
  const char* wished = by_warpgroups(check, x, a.w_dtype, kernel) ? kMatmulWgmma : nullptr;
  const Activations form = activations_from(check, x, a.w_dtype, activation_quantization);
  if (form == Activations::nvfp4) wished = kMatmulW4a4;
  a.int8 = form == Activations::int8;
  if (wished)
    return submit_cuda(runner, wished, &a, sizeof(a), x,
                       {&x, &w, &scale, &out, &row_width, &k_sizes, &n_sizes});
  const int64_t rows = std::min<int64_t>(check["R"], 256), tiles = (K + 63) / 64;
  submit(runner, matmul_cpu, a, {&x, &w, &scale, &out, &row_width, &k_sizes, &n_sizes},
         tiles * rows * 64 * 6 + rows * 64 * 4 + 64 * 64 * 4 + rows * 4 + 512);
}

void pack_entry(const TensorArg& source, const TensorArg& image, int64_t tile_row,
                const TensorArg& block_scales, const py::object& run) {
  Checker check("matmul_pack");
  const DType dtype = image_dtype(check, image, "image");
  if (dtype == DType::nvfp4) {
    check(source, "source").dtype({DType::u8}).shape({"N", "K / 2"}).rows_dense();
    const int64_t K = check["K / 2"] * 2;
    check.range(K % 16, "K modulo 16", 0, 0);
    check.bind("K", K);
    check(block_scales, "block_scales").dtype({DType::u8}).shape({"N", K / 16}).rows_dense();
  } else {
    check(source, "source").shape({"N", "K"}).rows_dense();
    if (dtype == DType::fp8)
      check(source, "source").dtype({DType::u8});
    else
      check(source, "source").dtype({DType::f32, DType::bf16});
    if (block_scales)
      check.fail("block_scales", std::string("be absent for ") + dtype_name(dtype) + " tiles",
                 block_scales.describe());
  }
  check(image, "image").dtype({DType::u8}).shape({"N tiles", "K tiles", "tile bytes"}).contiguous();
  check.range((check["K"] + 63) / 64, "K tiles of source", 0, check["K tiles"]);
  check.range(tile_row, "tile_row", 0, check["N tiles"] - (check["N"] + 63) / 64);
  submit(runner_from(run), matmul_pack_cpu,
         PackArgs{source, block_scales, image, dtype, static_cast<int>(tile_row)},
         {&source, &block_scales, &image});
}

const RegisterOp registered([](py::module_& m) {
  m.def("matmul", matmul_entry, py::arg("x"), py::arg("w"), py::arg("K"), py::arg("scale"),
        py::arg("out"), py::arg("segments"), py::arg("activation"), py::arg("row_width"),
        py::arg("k_sizes"), py::arg("n_sizes"), py::arg("activation_quantization"),
        py::arg("kernel"), py::arg("run"));
  m.def("matmul_pack", pack_entry, py::arg("source"), py::arg("image"), py::arg("tile_row"),
        py::arg("block_scales"), py::arg("run"));
});

}  // namespace
}  // namespace ei
