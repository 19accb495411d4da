// The Python module `_emu`: the same functions as `_C`, checks included, but every op runs its CUDA
// kernels through the emulator on CPU tensors, and the CPU's memory stands for a device's
// (device.cpp). For tests; never installed.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "emu.h"
#include "host/cuda.h"
#include "host/runtime.h"
#include "selftest.h"

namespace py = pybind11;

namespace ei {
namespace {

emu::Order order_from_name(const std::string& name) {
  if (name == "ascending") return emu::Order::ascending;
  if (name == "descending") return emu::Order::descending;
  if (name == "shuffled") return emu::Order::shuffled;
  throw std::invalid_argument("order must be ascending, descending or shuffled, got " + name);
}

}  // namespace
}  // namespace ei

PYBIND11_MODULE(_emu, m) {
  using namespace ei;
  m.doc() = "The CUDA kernels of elastic_infer on an emulated GPU.";
  m.def(
      "configure",
      [](const std::string& threads, const std::string& blocks, int workers) {
        emu::settings().threads = order_from_name(threads);
        emu::settings().blocks = order_from_name(blocks);
        emu::settings().workers = workers;
      },
      py::arg("threads") = "ascending", py::arg("blocks") = "ascending", py::arg("workers") = 2);
  m.def(
      "device",
      [](int multiprocessors, bool batch_invariant, int compute_capability) {
        emu::settings().multiprocessors = multiprocessors;
        emu::settings().compute_capability = compute_capability;
        emu::settings().batch_invariant = batch_invariant;
      },
      py::arg("multiprocessors") = 0, py::arg("batch_invariant") = false,
      py::arg("compute_capability") = 80,
      "What the ops are told of the device and of the wish for batch-invariant sums.");
  m.def("fibers", &emu::fibers, "What switches stacks: assembly, or ucontext.");
  m.def(
      "take_list",
      [](bool only) {
        std::vector<std::tuple<int64_t, unsigned, size_t, bool>> found;
        for (const emu::Listed& l : emu::take_list(only)) {
          Dl_info module;
          if (!dladdr(l.kernel, &module)) throw std::logic_error("a kernel of no module");
          found.emplace_back(
              static_cast<const char*>(l.kernel) - static_cast<char*>(module.dli_fbase), l.threads,
              l.shared_bytes, l.told);
        }
        return found;
      },
      py::arg("only") = false,
      "The different launches since the last call, each as (address of the kernel in the module, "
      "threads, bytes of dynamic shared memory, whether the kernel is told that these may be "
      "many). From now on, with `only`, launches are listed and checked but not run.");
  m.def(
      "use_stream",
      [](int number) { emu::current_stream() = number ? &emu::stream(number) : nullptr; },
      py::arg("number"), "The stream that ops and steps are given: 0 runs at once, 1 and 2 wait.");
  m.def("finish_streams", &emu::finish_streams, py::call_guard<py::gil_scoped_release>(),
        "Runs what streams 1 and 2 were given, a launch of each in turn.");
  m.def("has_kernel",
        [](const std::string& op) { return find_cuda_kernel(op.c_str()) != nullptr; });
  m.def("selftest", emu::selftest, py::arg("name"), py::call_guard<py::gil_scoped_release>(),
        "Runs one of the emulator's own small kernels (selftest.cu); returns what it computed.");
  m.def("multiply_add_nvfp4", emu::multiply_add_nvfp4, py::arg("a"), py::arg("b"),
        py::arg("scale_a"), py::arg("scale_b"), py::arg("pair_a"), py::arg("lane_b"),
        "One matrix product of a warp: words of a [32][4] and b [32][2], of the scales [32]; d "
        "[32][4].");
  m.def("multiply_add_async", emu::multiply_add_async, py::arg("memory"), py::arg("a"),
        py::arg("b"), py::arg("columns"),
        "One matrix product of a warpgroup: 16-bit words of shared memory, two descriptors; the "
        "sums of thread after thread.");
  m.def("matrix_descriptor", emu::matrix_descriptor, py::arg("atom"), py::arg("column"),
        "The descriptor that kernels make.");
  bind_runtime(m);
}
