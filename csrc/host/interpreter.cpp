#include "host/interpreter.h"

#include <chrono>
#include <exception>
#include <thread>

namespace ei {
namespace {

bool python_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

[[noreturn]] void sleep_for_ever() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

thread_local int foreign = 0;

const std::terminate_handler others = std::set_terminate([] {
  if (foreign > 0 && python_is_ending()) sleep_for_ever();
  others();
});

}  // namespace

Foreign::Foreign() { ++foreign; }
Foreign::~Foreign() { --foreign; }

Unlocked::~Unlocked() {
  if (python_is_ending()) sleep_for_ever();
  try {
    PyEval_RestoreThread(state_);
  } catch (...) {  // Python began to end while we waited for the lock; leaving this block aborts
    sleep_for_ever();
  }
}

}  // namespace ei
