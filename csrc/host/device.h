// The device that CUDA kernels run on, as the runtime needs it: memory, streams, recorded graphs.
//
// Three versions of these functions exist, one in each kind of module: host/device.cpp calls the
// CUDA runtime (or, in a build without CUDA, refuses), emu/device.cpp stands for it on the CPU:
// device memory is host memory, a stream runs at once, a graph is the list of launches that were
// recorded. The code above them is the same, so that it is tested without a GPU.
// Source: CUDA Runtime API, "Stream Management", "Graph Management".
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "host/cuda.h"
#include "host/tensor.h"

namespace ei::device {

using Stream = void*;  // cudaStream_t

// Whether kernels run on the memory of `t`.
inline bool holds(const Tensor& t) {
#if defined(ELASTIC_EMULATE)
  return t.given;
#else
  return t.given && t.cuda;
#endif
}

// Whether this module has CUDA kernels, and for which architectures ("80", "90a", ...).
bool built();
std::string missing();  // why not, as found when it was built
std::vector<std::string> architectures();

// A kernel that does nothing, to be asked for (CUDA only).
const void* probe_kernel();

// Whether kernels can run on device number `index`: empty, or in words why not.
std::string unusable(int index);

// What kernels are told of device `index`; the caller adds stream, workspace and wishes.
CudaCall call_on(int index);

// Whether kernels on device `index` were compiled for launches that overlap (prim_grid.cuh).
bool overlaps(int index);

// Makes `index` the calling thread's device for as long as the object lives.
class Use {
 public:
  explicit Use(int index);
  ~Use();
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  int before_;
};

// Memory of the thread's device, 256-byte aligned. Frees wait for the device.
struct Free {
  void operator()(char* p) const;
};
using Memory = std::unique_ptr<char, Free>;
Memory allocate(int64_t bytes);

// Overwrites memory that nobody may read before it is written, where that costs nothing (emulator).
void poison(char* memory, int64_t bytes);

// Whether work given to `stream` is being recorded rather than run.
bool recording(Stream stream);

// What `after` is given from now on begins when all that `before` was given is done.
void order(Stream before, Stream after);

#if defined(ELASTIC_EMULATE)
// The stream that ops are given; a test chooses it (emu.h).
Stream current();
#endif

// What was given to a stream between begin() and end(), to be run again by one call.
class Graph {
 public:
  Graph();
  ~Graph();
  // A stream of its own, whose work from now on is recorded and not run.
  Stream begin();
  void end();
  void run(Stream stream);

 private:
  struct Recorded;
  std::unique_ptr<Recorded> recorded_;
};

// Seconds between marks on a stream.
class Clock {
 public:
  explicit Clock(int marks);
  ~Clock();
  void mark(Stream stream);
  // Waits for the last mark; the times between neighbours.
  std::vector<double> seconds();

 private:
  struct Marks;
  std::unique_ptr<Marks> marks_;
};

}  // namespace ei::device
