// Checks and binding of moe_matmul and moe_workspace_bytes.
#include "moe_matmul.h"

#include "host/activations.h"
#include "host/check.h"
#include "host/image.h"
#include "host/step.h"
#include "host/widths.h"

namespace py = pybind11;

namespace ei {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 24;  // bytes of a workspace are counted in 64 bits

void check_ids(Checker& check, const Tensor& ids, int64_t E) {
  for (int64_t r = 0; r < ids.shape[0]; ++r)
    for (int64_t j = 0; j < ids.shape[1]; ++j) {
      const int32_t id = ids.ptr<int32_t>()[r * ids.stride[0] + j];
      if (id < 0 || id >= E)
        check.fail("ids", "hold experts in [0, " + std::to_string(E) + ")",
                   std::to_string(id) + " at row " + std::to_string(r));
    }
}

void moe_matmul_entry(const TensorArg& x, const TensorArg& up, const TensorArg& down, int64_t D,
                      int64_t F, const TensorArg& up_scale, const TensorArg& down_scale,
                      const TensorArg& ids, const TensorArg& weights, const TensorArg& out,
                      const TensorArg& shared, const TensorArg& workspace,
                      const TensorArg& row_width, const TensorArg& k_sizes,
                      const TensorArg& f_sizes, const std::string& activation_quantization,
                      const py::object& run) {
  Checker check("moe_matmul");
  const Runner runner = runner_from(run);
  check.bind("D", D);  // what the weights take and give
  check.bind("F", F);
  check.range(D, "D", 0, kMostChannels);
  check.range(F, "F", 0, kMostChannels);
  check(x, "x").dtype({DType::f32, DType::bf16}).shape({"R", "D"}).rows_dense();
  const int64_t D_tiles = (D + 63) / 64, F_tiles = (F + 63) / 64;
  check.range(D % 16, "D modulo 16", 0, 0);
  check.range(F % 16, "F modulo 16", 0, 0);
  check(up, "up").dtype({DType::u8}).shape({"E", F_tiles, D_tiles, "tile bytes"}).contiguous();
  check(down, "down").dtype({DType::u8}).shape({"E", D_tiles, F_tiles, "tile bytes"}).contiguous();
  const DType w_dtype = image_dtype(check, up, "up", x.dtype);
  check_scale(check, up_scale, "up_scale", w_dtype, "E");
  check_scale(check, down_scale, "down_scale", w_dtype, "E");
  check(ids, "ids").dtype({DType::i32}).shape({"R", "J"}).rows_dense();
  check(weights, "weights").dtype({DType::f32}).shape({"R", "J"}).rows_dense();
  check(out, "out").dtype({x.dtype}).shape({"R", "D"}).rows_dense();
  if (shared) check(shared, "shared").dtype({x.dtype}).shape({"R", "D"}).rows_dense();
  const int64_t R = check["R"], J = check["J"], E = check["E"];
  for (const int64_t n : {R, J, E}) check.range(n, "R, J and E", 0, INT32_MAX);
  check.range(R * J, "R * J", 0, INT32_MAX);
  const int64_t bytes = moe_workspace(R, J, E, D, F, dtype_size(x.dtype)).bytes;
  check(workspace, "workspace")
      .dtype({DType::u8})
      .shape({"bytes"})
      .contiguous()
      .require(workspace.numel() >= bytes,
               "hold the " + std::to_string(bytes) + " bytes that moe_workspace_bytes tells")
      .require(reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0,
               "start at a multiple of 16 bytes")
      .apart({{"x", &x},
              {"up", &up},
              {"down", &down},
              {"up_scale", &up_scale},
              {"down_scale", &down_scale},
              {"ids", &ids},
              {"weights", &weights},
              {"out", &out},
              {"shared", &shared},
              {"row_width", &row_width},
              {"k_sizes", &k_sizes},
              {"f_sizes", &f_sizes}});
  WidthCheck widths(check, row_width, !runner.step);
  widths.sizes(k_sizes, "k_sizes", D, 16);
  widths.sizes(f_sizes, "f_sizes", F, 16);
  if (!runner.step && !ids.cuda) check_ids(check, ids, E);
  const Activations form = activations_from(check, x, w_dtype, activation_quantization);
  const MoeMatmulArgs a{
      x,       up,  down,   w_dtype,   up_scale,  down_scale, F,       ids,
      weights, out, shared, workspace, row_width, k_sizes,    f_sizes, form == Activations::int8};
  const auto tensors = {&x,   &up,     &down,      &up_scale,  &down_scale, &ids,    &weights,
                        &out, &shared, &workspace, &row_width, &k_sizes,    &f_sizes};
  if (form == Activations::nvfp4)
    return submit_cuda(runner, kMoeMatmulW4a4, &a, sizeof(a), x, tensors);
  const int64_t rows = std::min<int64_t>(R * J, 256), tiles = std::max(D_tiles, F_tiles);
  submit(runner, moe_matmul_cpu, a, tensors,
         tiles * rows * 64 * 6 + rows * 64 * 4 + 64 * 64 * 4 + rows * 8 + 1024);
}

const RegisterOp registered([](py::module_& m) {
  m.def("moe_matmul", moe_matmul_entry, py::arg("x"), py::arg("up"), py::arg("down"), py::arg("D"),
        py::arg("F"), py::arg("up_scale"), py::arg("down_scale"), py::arg("ids"),
        py::arg("weights"), py::arg("out"), py::arg("shared"), py::arg("workspace"),
        py::arg("row_width"), py::arg("k_sizes"), py::arg("f_sizes"),
        py::arg("activation_quantization"), py::arg("run"));
  m.def("moe_workspace_bytes",
        [](int64_t R, int64_t J, int64_t E, int64_t D, int64_t F, int64_t itemsize) {
          return moe_workspace(R, J, E, D, F, itemsize).bytes;
        });
});

}  // namespace
}  // namespace ei
