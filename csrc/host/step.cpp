#include "host/step.h"

#include <algorithm>
#include <map>

#include "host/check.h"

namespace ei {

device::Stream Place::stream() const {
#if defined(ELASTIC_EMULATE)
  return device::current();
#else
  return current_stream(source, device_id);
#endif
}

Step::~Step() {
  if (!place_) return;
  try {
    const device::Use use(place_->device_id);
    graph_.reset();
    workspace_.reset();
  } catch (const std::runtime_error&) {  // the process ends, and the driver before us
    static_cast<void>(graph_.release());
    static_cast<void>(workspace_.release());
  }
}

Step::Call& Step::add(const char* name, const void* args, size_t bytes, const Place* place,
                      std::initializer_list<const TensorArg*> tensors) {
  if (running_ > 0) refuse(name, "run", "be a Step that no thread runs", "one that is being run");
  const bool same = calls_.empty() ||
                    (place ? place_ && place_->device_id == place->device_id : place_ == nullptr);
  if (!same)
    refuse(name, "tensors", "be on the device of the step's other ops",
           (*tensors.begin())->describe());
  if (place && !place_) {
    if (dependent_launch_ && !device::overlaps(place->device_id))
      refuse("Step", "dependent_launch", "be used on compute capability 9.0 or above",
             "kernels for an older one on device " + std::to_string(place->device_id));
    place_ = std::make_unique<Place>(*place);
  }
  graph_.reset();
  Call call;
  call.name = name;
  call.args.reset(new char[bytes]);
  std::memcpy(call.args.get(), args, bytes);
  for (const TensorArg* t : tensors)
    if (t->object) keep_.push_back(pybind11::reinterpret_borrow<pybind11::object>(t->object));
  calls_.push_back(std::move(call));
  return calls_.back();
}

void Step::append(const CudaKernel& kernel, const void* args, const Place& place,
                  std::initializer_list<const TensorArg*> tensors) {
  add(kernel.name, args, kernel.args_bytes, &place, tensors).cuda = &kernel;
  const device::Use use(place.device_id);
  const int64_t bytes =
      kernel.workspace_bytes ? kernel.workspace_bytes(args, cuda_call(nullptr)) : 0;
  if (bytes <= workspace_bytes_) return;
  workspace_.reset();
  workspace_ = device::allocate(bytes);
  workspace_bytes_ = bytes;
}

CudaCall Step::cuda_call(device::Stream stream) const {
  CudaCall call = device::call_on(place_->device_id);
  call.stream = stream;
  call.workspace = workspace_.get();
  call.batch_invariant |= pool_->batch_invariant();
  call.dependent_launch = dependent_launch_;
  return call;
}

void Step::launch_all(const CudaCall& call) const {
  for (const Call& c : calls_) c.cuda->launch(c.args.get(), call);
}

void Step::come_after_last(device::Stream stream) {
  if (ran_ && stream != last_) device::order(last_, stream);
  ran_ = true;
  last_ = stream;
}

void Step::run_on_device(device::Stream stream) {
  const device::Use use(place_->device_id);
  come_after_last(stream);
  if (graph_) return graph_->run(stream);
  // The first time one by one: that loads the kernels, which must not happen during a capture.
  launch_all(cuda_call(stream));
  if (!graph_wanted_ || device::recording(stream)) return;
  auto graph = std::make_unique<device::Graph>();
  launch_all(cuda_call(graph->begin()));
  graph->end();
  graph_ = std::move(graph);
  ++captures_;
}

void Step::run() {
  const device::Stream stream = place_ ? place_->stream() : nullptr;
  const Running running(*this);
  const Unlocked unlocked;
  const auto lock = pool_->hold();
  if (place_) return run_on_device(stream);
  for (const Call& call : calls_) call.invoke(call.kernel, call.args.get(), *pool_);
  pool_->check_failure();
}

std::vector<std::pair<std::string, double>> Step::profile() {
  using Clock = std::chrono::steady_clock;
  std::vector<std::pair<std::string, double>> times;
  times.reserve(calls_.size());
  const device::Stream stream = place_ ? place_->stream() : nullptr;
  const Running running(*this);
  const Unlocked unlocked;
  const auto lock = pool_->hold();
  if (place_) {
    const device::Use use(place_->device_id);
    come_after_last(stream);
    device::Clock clock(static_cast<int>(calls_.size()) + 1);
    const CudaCall context = cuda_call(stream);
    clock.mark(stream);
    for (const Call& call : calls_) {
      call.cuda->launch(call.args.get(), context);
      clock.mark(stream);
    }
    const std::vector<double> seconds = clock.seconds();
    for (size_t i = 0; i < calls_.size(); ++i) times.emplace_back(calls_[i].name, seconds[i]);
    return times;
  }
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

namespace {

// Workspaces of ops that run at once, one per device and stream, whose work is in order. They grow
// while arguments are checked, at least to double, and what was outgrown is kept: a graph that the
// caller captured may use it.
class Workspaces {
 public:
  char* get(const char* op, int device_id, device::Stream stream, int64_t bytes) {
    if (bytes == 0) return nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Block>& blocks = blocks_[{device_id, stream}];
    const int64_t most = blocks.empty() ? 0 : blocks.back().bytes;
    if (bytes > most) {
      if (device::recording(stream))
        throw std::runtime_error(std::string(op) +
                                 ": run it once on this stream before capturing it, so that its "
                                 "workspace is there");
      const int64_t size = std::max({bytes, 2 * most, int64_t{1} << 20});
      blocks.push_back({device::allocate(size), size});
    }
    char* memory = blocks.back().memory.get();
    device::poison(memory, bytes);
    return memory;
  }

 private:
  struct Block {
    device::Memory memory;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::map<std::pair<int, device::Stream>, std::vector<Block>> blocks_;
};

Workspaces& workspaces() {
  static auto* all = new Workspaces;  // outlives the driver's own end
  return *all;
}

}  // namespace

void submit_cuda(const Runner& runner, const char* name, const void* args, size_t args_bytes,
                 const TensorArg& first, std::initializer_list<const TensorArg*> tensors) {
  const CudaKernel* kernel = find_cuda_kernel(name);
  if (!kernel) refuse(name, "tensors", "be on the CPU: it has no CUDA kernel", first.describe());
  if (kernel->args_bytes != args_bytes)
    throw std::logic_error(std::string(name) + ": arguments of another size");
  const Place place{first.source, first.device_id};
  if (runner.step) return runner.step->append(*kernel, args, place, tensors);
  CudaCall call = device::call_on(place.device_id);
  call.stream = place.stream();
  call.batch_invariant |= runner.pool->batch_invariant();
  const Unlocked unlocked;
  const device::Use use(place.device_id);
  const int64_t bytes = kernel->workspace_bytes ? kernel->workspace_bytes(args, call) : 0;
  call.workspace = workspaces().get(name, place.device_id, call.stream, bytes);
  kernel->launch(args, call);
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
