// A recorded step: a list of (kernel, arguments) that one native call replays.
//
// Every op's Python function takes `run`: None runs it at once on one thread, a Pool runs it at
// once on that pool, a Step appends it to the step's list. A Step keeps the tensors of its
// arguments alive; their contents may change between replays, their addresses may not.
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

#include "caster.h"
#include "cuda.h"
#include "isa.h"
#include "pool.h"

namespace ei {

class Step {
 public:
  explicit Step(std::shared_ptr<Pool> pool) : pool_(std::move(pool)) {}

  // Replays all calls in order. Releases the interpreter lock once.
  void run();
  // As run(), and returns [(op, seconds)] in order.
  std::vector<std::pair<std::string, double>> profile();
  size_t size() const { return calls_.size(); }
  std::vector<std::string> names() const;
  Pool& pool() { return *pool_; }

  template <class Args>
  void append(const char* name, void (*fn)(const Args&, Pool&), const Args& args,
              std::initializer_list<const TensorArg*> tensors) {
    static_assert(std::is_trivially_copyable_v<Args>, "arguments are kept as plain bytes");
    Call call;
    call.name = name;
    call.args.reset(new char[sizeof(Args)]);
    std::memcpy(call.args.get(), &args, sizeof(Args));
    call.kernel = reinterpret_cast<void (*)()>(fn);
    call.invoke = [](void (*kernel)(), const char* bytes, Pool& pool) {
      reinterpret_cast<void (*)(const Args&, Pool&)>(kernel)(*reinterpret_cast<const Args*>(bytes),
                                                             pool);
    };
    calls_.push_back(std::move(call));
    for (const TensorArg* t : tensors)
      if (t->object) keep_.push_back(pybind11::reinterpret_borrow<pybind11::object>(t->object));
  }

 private:
  struct Call {
    const char* name;
    std::unique_ptr<char[]> args;
    void (*kernel)();
    void (*invoke)(void (*)(), const char*, Pool&);
  };
  std::shared_ptr<Pool> pool_;
  std::vector<Call> calls_;
  std::vector<pybind11::object> keep_;
};

// What `run` stands for.
struct Runner {
  Step* step = nullptr;
  std::shared_ptr<Pool> pool;
};
Runner runner_from(const pybind11::object& run);

// Records the kernel in `runner.step`, or runs it now without the interpreter lock.
// `scratch_bytes` is what each thread of the pool may use.
template <class Args>
void submit(const Runner& runner, const CpuKernel<Args>& kernel, const Args& args,
            std::initializer_list<const TensorArg*> tensors, int64_t scratch_bytes = 0) {
#if defined(ELASTIC_EMULATE)
  static_cast<void>(runner), static_cast<void>(tensors), static_cast<void>(scratch_bytes);
  pybind11::gil_scoped_release unlocked;
  run_emulated(kernel.name, &args, sizeof(Args));
#else
  Pool& pool = runner.step ? runner.step->pool() : *runner.pool;
  auto* fn = kernel.variant[static_cast<int>(pool.isa())];
  if (runner.step) {
    runner.step->append(kernel.name, fn, args, tensors);
  }
  pybind11::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(pool.busy());
  pool.reserve(scratch_bytes);
  if (runner.step) return;
  fn(args, pool);
  pool.check_failure();
#endif
}

// Registration of an op's binding: a static object in `<op>.cpp`, so that no list is edited.
using Binder = void (*)(pybind11::module_&);
struct RegisterOp {
  explicit RegisterOp(Binder binder);
};
const std::vector<Binder>& binders();

}  // namespace ei
