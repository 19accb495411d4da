// Hints to the operating system about memory that holds weights.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "host/check.h"
#include "host/step.h"

namespace py = pybind11;

namespace ei {
namespace {

// Asks for large pages behind a tensor's memory: weights are streamed, and with small pages the
// address translation is part of the cost. A hint: where it is not known, nothing changes.
bool advise_huge_pages(const TensorArg& memory) {
  Checker check("advise_huge_pages");
  check(memory, "memory").dtype({DType::u8}).shape({"bytes"}).contiguous();
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kSmallPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data);
  const uintptr_t first = (begin + kSmallPage - 1) / kSmallPage * kSmallPage;
  const uintptr_t end = (begin + memory.numel()) / kSmallPage * kSmallPage;
  if (memory.cuda || end <= first) return false;
  return madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

const RegisterOp registered([](py::module_& m) {
  m.def("advise_huge_pages", advise_huge_pages, py::arg("memory"),
        "Asks for large pages behind a uint8 tensor; whether the system took the hint.");
});

}  // namespace
}  // namespace ei
