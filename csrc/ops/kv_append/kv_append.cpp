// Checks and binding of kv_append.
#include "kv_append.h"

#include <algorithm>
#include <vector>

#include "host/attention_checks.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

// Each slot is -1 or a place in the pages, and no place is written twice.
void check_slots(const Checker& check, const Tensor& slot_mapping, int64_t places) {
  std::vector<int32_t> slots;
  for (int64_t r = 0; r < slot_mapping.shape[0]; ++r) {
    const int32_t slot = slot_mapping.ptr<int32_t>()[r];
    if (slot < -1 || slot >= places)
      check.fail("slot_mapping", "hold -1 or slots in [0, " + std::to_string(places) + ")",
                 std::to_string(slot) + " at row " + std::to_string(r));
    if (slot >= 0) slots.push_back(slot);
  }
  std::sort(slots.begin(), slots.end());
  const auto twice = std::adjacent_find(slots.begin(), slots.end());
  if (twice != slots.end())
    check.fail("slot_mapping", "name each slot once", std::to_string(*twice) + " twice");
}

void kv_append_entry(const TensorArg& k, const TensorArg& v, const TensorArg& k_pages,
                     const TensorArg& v_pages, const TensorArg& slot_mapping, double k_scale,
                     double v_scale, const py::object& run) {
  Checker check("kv_append");
  const Runner runner = runner_from(run);
  check(k_pages, "k_pages").dtype({DType::f32, DType::bf16, DType::u8});
  check(k_pages, "k_pages").shape({"pages", "Hkv", 64, "K"});
  check(k_pages, "k_pages").contiguous();
  check(v_pages, "v_pages").dtype({k_pages.dtype}).shape({"pages", "Hkv", 64, "K"}).contiguous();
  check.range(check["K"], "head size K", 1, INT32_MAX);
  const int64_t row = check["Hkv"] * check["K"];
  if (k_pages.dtype == DType::u8)
    check(k, "k").dtype({DType::f32, DType::bf16});
  else
    check(k, "k").dtype({k_pages.dtype});
  check(k, "k").shape({"R", row}).rows_dense();
  check(v, "v").dtype({k.dtype}).shape({"R", row}).rows_dense();
  check(slot_mapping, "slot_mapping").dtype({DType::i32}).shape({"R"}).contiguous();
  check_page_scale(check, k_pages, k_scale, "k_scale");
  check_page_scale(check, v_pages, v_scale, "v_scale");
  if (!runner.step && !slot_mapping.cuda) check_slots(check, slot_mapping, check["pages"] * 64);
  submit(runner, kv_append_cpu,
         KvAppendArgs{k, v, k_pages, v_pages, slot_mapping, static_cast<float>(k_scale),
                      static_cast<float>(v_scale)},
         {&k, &v, &k_pages, &v_pages, &slot_mapping});
}

const RegisterOp registered([](py::module_& m) {
  m.def("kv_append", kv_append_entry, py::arg("k"), py::arg("v"), py::arg("k_pages"),
        py::arg("v_pages"), py::arg("slot_mapping"), py::arg("k_scale"), py::arg("v_scale"),
        py::arg("run"));
});

}  // namespace
}  // namespace ei
