// The one Python module of native code. Ops register themselves (RegisterOp in `<op>.cpp`).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "step.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace ei;
  m.doc() = "Native kernels and host objects of elastic_infer.";
  py::class_<Pool, std::shared_ptr<Pool>>(m, "Pool")
      .def(py::init([](int threads, const std::string& isa) {
             if (threads < 1 || threads > 1024)
               throw std::invalid_argument("pool: threads must be in [1, 1024], got " +
                                           std::to_string(threads));
             return std::make_shared<Pool>(threads, isa_from_name(isa));
           }),
           py::arg("threads") = 1, py::arg("isa") = "auto")
      .def_property_readonly("threads", &Pool::threads)
      .def_property_readonly("isa", [](const Pool& p) { return isa_name(p.isa()); });
  py::class_<Step>(m, "Step")
      .def(py::init<std::shared_ptr<Pool>>(), py::arg("pool"))
      .def("run", &Step::run)
      .def("profile", &Step::profile)
      .def("names", &Step::names)
      .def("__len__", &Step::size);
  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kIsaCount; ++i)
      if (isa_usable(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
    return names;
  });
  m.def(
      "describe", [](const TensorArg& t) { return t.describe(); },
      "What the native side sees of a tensor.");
  for (Binder bind : binders()) bind(m);
}
