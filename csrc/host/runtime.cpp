#include "host/runtime.h"

#include <pybind11/stl.h>

#include "host/device.h"
#include "host/native.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

std::shared_ptr<Pool> make_pool(int threads, const std::string& isa, bool batch_invariant) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("pool: threads must be in [1, 1024], got " +
                                std::to_string(threads));
  return std::make_shared<Pool>(threads, isa_from_name(isa), batch_invariant);
}

}  // namespace

void bind_runtime(py::module_& m) {
  // Local to the module: `_C` and `_emu` may be loaded side by side.
  py::class_<Pool, std::shared_ptr<Pool>>(m, "Pool", py::module_local())
      .def(py::init(&make_pool), py::arg("threads") = 1, py::arg("isa") = "auto",
           py::arg("batch_invariant") = false)
      .def_property_readonly("threads", &Pool::threads)
      .def_property_readonly("batch_invariant", &Pool::batch_invariant)
      .def_property_readonly("isa", [](const Pool& p) { return isa_name(p.isa()); });
  py::class_<Step>(m, "Step", py::module_local())
      .def(py::init<std::shared_ptr<Pool>, bool, bool>(), py::arg("pool").none(false),
           py::arg("graph") = true, py::arg("dependent_launch") = false)
      .def("run", &Step::run)
      .def("profile", &Step::profile)
      .def("names", &Step::names)
      .def_property_readonly("captures", &Step::captures)
      .def("__len__", &Step::size);
  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kIsaCount; ++i)
      if (isa_usable(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    return names;
  });
  m.def("cuda_architectures", device::architectures,
        "Architectures that CUDA kernels were compiled for; empty: this build has none.");
  m.def("cuda_missing", device::missing,
        "Why this build has no CUDA kernels, as found when it was built; empty if it has.");
  m.def("cuda_unusable", device::unusable, py::arg("index") = 0,
        "Why CUDA device `index` cannot be used; empty if it can.");
  m.def("cuda_lacks", lacks_capability, py::arg("index"), py::arg("wanted"), py::arg("family"),
        "Why CUDA device `index` cannot run kernels of capability `wanted` (major * 10 + minor), "
        "or, as a family, of its major number; empty if it can.");
  m.def(
      "describe", [](const TensorArg& t) { return t.describe(); },
      "What the native side sees of a tensor.");
  for (Binder bind : binders()) bind(m);
}

}  // namespace ei
