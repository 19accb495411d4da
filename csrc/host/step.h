// A recorded step: a list of (kernel, arguments) that one native call replays.
//
// Every op's Python function takes `run`: None runs it at once on one thread, a Pool runs it at
// once on that pool, a Step appends it to the step's list. A Step keeps the tensors of its
// arguments alive; their contents may change between replays, their addresses may not. Nothing is
// recorded into a step while it runs; threads that run one step take turns.
//
// An op on CUDA tensors runs on their framework's current stream; the pool's threads do nothing
// then, but its `batch_invariant` holds. The first run of a Step on CUDA gives its kernels to that
// stream one by one and then records them as a graph, which every later run launches. Runs on
// different streams come one after another: they share the step's workspace and buffers.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "host/caster.h"
#include "host/cuda.h"
#include "host/device.h"
#include "host/interpreter.h"
#include "host/isa.h"
#include "host/pool.h"

namespace ei {

// The device that an op's tensors are on, and where work for it goes.
struct Place {
  const DLPackExchangeAPI* source;
  int device_id;

  // The framework's current stream. Needs the interpreter lock.
  device::Stream stream() const;
};

class Step {
 public:
  // `graph`: whether a step on CUDA is captured. `dependent_launch`: whether its kernels may begin
  // while those before them still run, as far as they are written for it.
  explicit Step(std::shared_ptr<Pool> pool, bool graph = true, bool dependent_launch = false)
      : pool_(std::move(pool)), graph_wanted_(graph), dependent_launch_(dependent_launch) {}
  ~Step();

  // Replays all calls in order. Releases the interpreter lock once.
  void run();
  // As run(), one by one, and returns [(op, seconds)] in order.
  std::vector<std::pair<std::string, double>> profile();
  size_t size() const { return calls_.size(); }
  std::vector<std::string> names() const;
  // How often a graph was captured: once in a step's life.
  int captures() const { return captures_; }
  Pool& pool() { return *pool_; }

  template <class Args>
  void append(const char* name, void (*fn)(const Args&, Pool&), const Args& args,
              std::initializer_list<const TensorArg*> tensors) {
    static_assert(std::is_trivially_copyable_v<Args>, "arguments are kept as plain bytes");
    Call& call = add(name, &args, sizeof(Args), nullptr, tensors);
    call.kernel = reinterpret_cast<void (*)()>(fn);
    call.invoke = [](void (*kernel)(), const char* bytes, Pool& pool) {
      reinterpret_cast<void (*)(const Args&, Pool&)>(kernel)(*reinterpret_cast<const Args*>(bytes),
                                                             pool);
    };
  }
  void append(const CudaKernel& kernel, const void* args, const Place& place,
              std::initializer_list<const TensorArg*> tensors);

 private:
  struct Call {
    const char* name;
    std::unique_ptr<char[]> args;
    void (*kernel)() = nullptr;
    void (*invoke)(void (*)(), const char*, Pool&) = nullptr;
    const CudaKernel* cuda = nullptr;  // then the two above are null
  };
  Call& add(const char* name, const void* args, size_t bytes, const Place* place,
            std::initializer_list<const TensorArg*> tensors);
  CudaCall cuda_call(device::Stream stream) const;
  void launch_all(const CudaCall& call) const;
  void run_on_device(device::Stream stream);
  void come_after_last(device::Stream stream);

  // While one lives, the list of calls does not change. Made and destroyed with the interpreter
  // lock.
  struct Running {
    explicit Running(Step& s) : step(s) { ++step.running_; }
    ~Running() { --step.running_; }
    Step& step;
  };

  std::shared_ptr<Pool> pool_;
  const bool graph_wanted_, dependent_launch_;
  std::vector<Call> calls_;
  std::vector<pybind11::object> keep_;
  std::unique_ptr<Place> place_;  // on CUDA
  device::Memory workspace_;      // of the call that needs most
  int64_t workspace_bytes_ = 0;
  std::unique_ptr<device::Graph> graph_;
  bool ran_ = false;
  device::Stream last_ = nullptr;  // where it ran last
  int captures_ = 0;
  int running_ = 0;  // guarded by the interpreter lock
};

// What `run` stands for.
struct Runner {
  Step* step = nullptr;
  std::shared_ptr<Pool> pool;
};
Runner runner_from(const pybind11::object& run);

// Runs or records the CUDA kernels of `name`. Refuses an op that has none.
void submit_cuda(const Runner& runner, const char* name, const void* args, size_t args_bytes,
                 const TensorArg& first, std::initializer_list<const TensorArg*> tensors);

// Records the kernel in `runner.step`, or runs it now without the interpreter lock.
// `scratch_bytes` is what each thread of the pool may use.
template <class Args>
void submit(const Runner& runner, const CpuKernel<Args>& kernel, const Args& args,
            std::initializer_list<const TensorArg*> tensors, int64_t scratch_bytes = 0) {
  const TensorArg& first = **tensors.begin();
  if (device::holds(first))
    return submit_cuda(runner, kernel.name, &args, sizeof(Args), first, tensors);
  Pool& pool = runner.step ? runner.step->pool() : *runner.pool;
  auto* fn = kernel.variant[static_cast<int>(pool.isa())];
  if (runner.step) {
    runner.step->append(kernel.name, fn, args, tensors);
  }
  const Unlocked unlocked;
  const auto lock = pool.hold();
  pool.reserve(scratch_bytes);
  if (runner.step) return;
  fn(args, pool);
  pool.check_failure();
}

// Registration of an op's binding: a static object in `<op>.cpp`, so that no list is edited.
using Binder = void (*)(pybind11::module_&);
struct RegisterOp {
  explicit RegisterOp(Binder binder);
};
const std::vector<Binder>& binders();

}  // namespace ei
