// The Python module `_emu`: the same functions as `_C`, checks included, but every op runs its CUDA
// kernels through the emulator on CPU tensors. For tests; never installed.
#include <pybind11/pybind11.h>

#include <memory>
#include <new>
#include <stdexcept>

#include "../core/cuda.h"
#include "../core/step.h"
#include "emu.h"
#include "selftest.h"

namespace py = pybind11;

namespace ei {

// What every emulated call finds in its CudaCall.
static CudaCall& emulated_device() {
  static CudaCall call;
  return call;
}

void run_emulated(const char* name, const void* args, size_t args_bytes) {
  const CudaKernel* kernel = find_cuda_kernel(name);
  if (!kernel) throw std::runtime_error(std::string(name) + ": no CUDA kernel");
  if (kernel->args_bytes != args_bytes)
    throw std::logic_error(std::string(name) + ": arguments of another size");
  CudaCall call = emulated_device();
  const int64_t bytes = kernel->workspace_bytes ? kernel->workspace_bytes(args, call) : 0;
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(256)); }
  };
  const std::unique_ptr<char, Free> workspace(
      static_cast<char*>(::operator new[](bytes, std::align_val_t(256))));
  std::memset(workspace.get(), 0xff, bytes);
  call.workspace = workspace.get();
  kernel->launch(args, call);
}

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
        emu::settings() = {order_from_name(threads), order_from_name(blocks), workers};
      },
      py::arg("threads") = "ascending", py::arg("blocks") = "ascending", py::arg("workers") = 2);
  m.def(
      "device",
      [](int multiprocessors, bool batch_invariant) {
        emulated_device().multiprocessors = multiprocessors;
        emulated_device().batch_invariant = batch_invariant;
      },
      py::arg("multiprocessors") = 0, py::arg("batch_invariant") = false,
      "What the ops are told of the device and of the wish for batch-invariant sums.");
  m.def("has_kernel",
        [](const std::string& op) { return find_cuda_kernel(op.c_str()) != nullptr; });
  m.def("selftest", emu::selftest, py::arg("name"), py::call_guard<py::gil_scoped_release>(),
        "Runs one of the emulator's own small kernels (selftest.cu); returns what it computed.");
  for (Binder bind : binders()) bind(m);
}
