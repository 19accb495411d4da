#include "step.h"

namespace ei {

void Step::run() {
  pybind11::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(pool_->busy());
  for (const Call& call : calls_) call.invoke(call.kernel, call.args.get(), *pool_);
  pool_->check_failure();
}

std::vector<std::pair<std::string, double>> Step::profile() {
  using Clock = std::chrono::steady_clock;
  std::vector<std::pair<std::string, double>> times;
  times.reserve(calls_.size());
  pybind11::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(pool_->busy());
  for (const Call& call : calls_) {
    const auto start = Clock::now();
    call.invoke(call.kernel, call.args.get(), *pool_);
    times.emplace_back(call.name, std::chrono::duration<double>(Clock::now() - start).count());
  }
  pool_->check_failure();
  return times;
}

std::vector<std::string> Step::names() const {
  std::vector<std::string> names;
  for (const Call& call : calls_) names.emplace_back(call.name);
  return names;
}

static std::vector<Binder>& binder_list() {
  static std::vector<Binder> list;
  return list;
}
RegisterOp::RegisterOp(Binder binder) { binder_list().push_back(binder); }
const std::vector<Binder>& binders() { return binder_list(); }

Runner runner_from(const pybind11::object& run) {
  Runner r;
  if (run.is_none()) {
    r.pool = std::make_shared<Pool>(1, best_isa());  // one thread: starts none
  } else if (pybind11::isinstance<Step>(run)) {
    r.step = run.cast<Step*>();
  } else if (pybind11::isinstance<Pool>(run)) {
    r.pool = run.cast<std::shared_ptr<Pool>>();
  } else {
    throw pybind11::type_error("run must be None, a Pool or a Step, got " +
                               std::string(Py_TYPE(run.ptr())->tp_name));
  }
  return r;
}

}  // namespace ei
