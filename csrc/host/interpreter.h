// The interpreter lock, given back while native code works.
#pragma once
#include <pybind11/pybind11.h>

namespace ei {

// Releases the lock for the life of the object. A thread that comes back when Python is ending
// never runs Python again: it sleeps until the process is gone. (Python would end it, by an
// unwinding that no destructor lets through.)
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// While one lives, this thread runs a framework's code that may give the lock back by itself. If
// Python ends meanwhile, that code's unwinding reaches one of its destructors, and std::terminate
// is called: then, too, the thread sleeps.
class Foreign {
 public:
  Foreign();
  ~Foreign();
  Foreign(const Foreign&) = delete;
  Foreign& operator=(const Foreign&) = delete;
};

}  // namespace ei
