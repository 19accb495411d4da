// The fibers, their scheduler and the memory of the emulator (emu.h).
#include "emu.h"

#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#if !defined(__x86_64__) && !defined(EI_EMU_UCONTEXT)
#define EI_EMU_UCONTEXT 1
#endif
#if defined(EI_EMU_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EI_EMU_ASAN 1
#endif

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace ei::emu {
namespace {

#if defined(EI_EMU_ASAN)
constexpr size_t kStackBytes = 512 * 1024;  // instrumented frames are large
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr int kLanes = 32;

// ---- switching stacks

#if defined(EI_EMU_UCONTEXT)
constexpr const char* kFibers = "ucontext";
struct Context {
  ucontext_t saved;
};
void switch_to(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
void prepare(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.saved);
  c.saved.uc_stack.ss_sp = stack;
  c.saved.uc_stack.ss_size = kStackBytes;
  c.saved.uc_link = nullptr;
  makecontext(&c.saved, entry, 0);
}
#else
constexpr const char* kFibers = "assembly";
struct Context {
  void* sp = nullptr;
};
extern "C" void ei_emu_switch(void** save, void* load);
// Callee-saved registers go to the old stack, its pointer to *save; then the same backwards.
asm(R"(
.text
.type ei_emu_switch, @function
ei_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ei_emu_switch, .-ei_emu_switch
)");
void switch_to(Context& from, Context& to) { ei_emu_switch(&from.sp, to.sp); }
void prepare(Context& c, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;  // the return address of an entry that never returns
  top[-2] = reinterpret_cast<void*>(entry);
  c.sp = top - 2 - 6;
  std::fill(top - 8, top - 2, nullptr);
}
#endif

// ---- one worker: the fibers of the block that it runs

enum class State { ready, at_barrier, at_warp_op, returned, at_launch_wait };

struct Copy {
  char* to;
  int bytes;
  char data[16];
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  State state = State::ready;
  Here here;
  int index = 0;
  bool waited = false;                    // for the launches ahead
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // copies not committed yet
  void* fake_stack = nullptr;             // AddressSanitizer's
};

struct Warp {
  const char* name = nullptr;
  int arrived = 0;
  alignas(64) char in[kLanes * (kWarpOperand + 16)];
  alignas(64) char out[kLanes * kWarpOperand];
};

struct FreeAligned {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t(128)); }
};
using Memory = std::unique_ptr<char, FreeAligned>;
Memory nan_memory(size_t bytes) {
  Memory m(static_cast<char*>(::operator new[](bytes, std::align_val_t(128))));
  std::memset(m.get(), 0xff, bytes);
  return m;
}

class Worker;
thread_local Worker* worker = nullptr;
thread_local Fiber* running = nullptr;

class Worker {
 public:
  ~Worker() {
    for (auto& f : fibers_) munmap(f->stack, kStackBytes);
  }

  // Makes the threads of one block ready, to run in this order. `held`: they stop where they wait
  // for the launches ahead, until let_go(). With descending threads a warp runs on as long as it
  // need not wait for another, so that what it overwrites too early is lost to the others; else all
  // warps take turns at every warp operation.
  void begin(const Launch& launch, dim3 block, const std::vector<int>& order, bool held) {
    launch_ = &launch;
    order_ = &order;
    held_ = held;
    count_ = static_cast<int>(order.size());
    failure_.clear();
    at_barrier_ = 0;
    objects_.clear(), static_bytes_ = 0;
    dynamic_ = nan_memory(launch.shared_bytes);
    while (static_cast<int>(fibers_.size()) < count_) fibers_.push_back(new_fiber());
    warps_.assign(count_ / kLanes, Warp());
    const dim3 size = launch.block;
    for (int i = 0; i < count_; ++i) {
      const unsigned x = i % size.x, y = i / size.x % size.y, z = i / size.x / size.y;
      start(*fibers_[i], i, Here{dim3(x, y, z), block, size, launch.grid});
    }
  }

  // Runs them as far as they come.
  void advance() {
    const bool ahead = settings().threads == Order::descending;
    worker = this;
    for (bool moved = failure_.empty(); moved;) {
      moved = false;
      for (int i : *order_) {
        if (fibers_[i]->state != State::ready) continue;
        moved = true;
        resume(*fibers_[i]);
        if (ahead) run_warp(i / kLanes * kLanes);
        if (!failure_.empty()) break;
      }
      if (!failure_.empty()) break;
    }
    worker = nullptr;
  }

  void let_go() { held_ = false, release(State::at_launch_wait, 0, count_); }

  // The block is over. Empty, or what went wrong.
  std::string end() {
    if (failure_.empty()) failure_ = stuck();
    dynamic_.reset();
    objects_.clear();
    return failure_;
  }

  // ---- what a running fiber calls

  void sync() {
    if (++at_barrier_ < count_) return park(State::at_barrier);
    at_barrier_ = 0;
    release(State::at_barrier, 0, count_);
  }

  void wait_for_launches() {
    running->waited = true;
    if (held_) park(State::at_launch_wait);
  }

  void warp_op(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
               WarpOp op) {
    const int lane = running->index % kLanes, first = running->index - lane;
    Warp& w = warps_[running->index / kLanes];
    if (w.arrived == 0) w.name = name;
    if (std::strcmp(w.name, name) != 0)
      fail(std::string("the lanes of a warp are at different operations: ") + w.name + " and " +
           name);
    std::memcpy(w.in + lane * in_bytes, in, in_bytes);
    if (++w.arrived < kLanes) {
      park(State::at_warp_op);
    } else {
      w.arrived = 0;
      op(w.in, w.out);
      release(State::at_warp_op, first, first + kLanes);
    }
    std::memcpy(out, w.out + lane * out_bytes, out_bytes);
  }

  void* object(const void* site, size_t bytes) {
    for (auto& o : objects_)
      if (o.first == site) return o.second.get();
    static_bytes_ += (bytes + 15) / 16 * 16;
    if (const std::string wrong = beyond_shared(*launch_, static_bytes_); !wrong.empty())
      abandon(wrong);
    objects_.emplace_back(site, nan_memory(bytes));
    return objects_.back().second.get();
  }
  void* dynamic() { return dynamic_.get(); }

  [[noreturn]] void abandon(const std::string& message) {
    const Here& h = running->here;
    failure_ = message + ", in thread " + std::to_string(running->index) + " of block (" +
               std::to_string(h.block.x) + ", " + std::to_string(h.block.y) + ", " +
               std::to_string(h.block.z) + ")";
    for (;;) park(State::returned);  // the scheduler never comes back
  }

 private:
  std::unique_ptr<Fiber> new_fiber() {
    auto f = std::make_unique<Fiber>();
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    f->stack = static_cast<char*>(stack);
    return f;
  }

  void start(Fiber& f, int index, const Here& here) {
    f.here = here;
    f.index = index;
    f.state = State::ready;
    f.waited = false;
    f.groups.clear();
    f.open.clear();
#if defined(EI_EMU_ASAN)
    __asan_unpoison_memory_region(f.stack, kStackBytes);
    f.fake_stack = nullptr;
#endif
    prepare(f.context, f.stack, &Worker::fiber_main);
  }

  static void fiber_main() {
#if defined(EI_EMU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &worker->own_stack_, &worker->own_stack_bytes_);
#endif
    worker->launch_->body();
    if (!running->open.empty()) fail("a thread returned before it committed its copies");
    if (worker->launch_->early && !running->waited)
      fail("a thread returned before it waited for the launches ahead");
    worker->park(State::returned);
  }

  void resume(Fiber& f) {
    running = &f;
#if defined(EI_EMU_ASAN)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, f.stack, kStackBytes);
#endif
    switch_to(own_, f.context);
#if defined(EI_EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    running = nullptr;
  }

  void park(State state) {
    Fiber& f = *running;
    f.state = state;
#if defined(EI_EMU_ASAN)
    __sanitizer_start_switch_fiber(state == State::returned ? nullptr : &f.fake_stack, own_stack_,
                                   own_stack_bytes_);
#endif
    switch_to(f.context, own_);
#if defined(EI_EMU_ASAN)
    __sanitizer_finish_switch_fiber(f.fake_stack, &own_stack_, &own_stack_bytes_);
#endif
  }

  // Until none of a warp's threads is ready.
  void run_warp(int first) {
    for (bool moved = true; moved;) {
      moved = false;
      for (int i = first + kLanes - 1; i >= first && failure_.empty(); --i) {
        if (fibers_[i]->state != State::ready) continue;
        moved = true;
        resume(*fibers_[i]);
      }
    }
  }

  void release(State from, int begin, int end) {
    for (int i = begin; i < end; ++i)
      if (fibers_[i]->state == from) fibers_[i]->state = State::ready;
  }

  // Nobody can run: fine if all have returned, otherwise who waits where.
  std::string stuck() const {
    int counts[5] = {};
    const char* name = "";
    const Fiber* one = nullptr;
    for (int i = 0; i < count_; ++i) {
      const Fiber& f = *fibers_[i];
      ++counts[static_cast<int>(f.state)];
      if (f.state == State::at_warp_op) name = warps_[i / kLanes].name;
      if (f.state != State::returned) one = &f;
    }
    if (!one) return "";
    const dim3 b = one->here.block;
    return "divergent barrier in block (" + std::to_string(b.x) + ", " + std::to_string(b.y) +
           ", " + std::to_string(b.z) + "): of " + std::to_string(count_) + " threads " +
           std::to_string(counts[1]) + " wait at __syncthreads, " + std::to_string(counts[2]) +
           " at a warp operation (" + name + "), " + std::to_string(counts[3]) + " have returned";
  }

  const Launch* launch_ = nullptr;
  const std::vector<int>* order_ = nullptr;
  bool held_ = false;
  int count_ = 0, at_barrier_ = 0;
  std::string failure_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::pair<const void*, Memory>> objects_;
  size_t static_bytes_ = 0;
  Memory dynamic_;
  Context own_;
  const void* own_stack_ = nullptr;
  size_t own_stack_bytes_ = 0;
};

std::vector<int> ordered(int n, Order order) {
  std::vector<int> list(n);
  for (int i = 0; i < n; ++i) list[i] = order == Order::descending ? n - 1 - i : i;
  if (order == Order::shuffled) std::shuffle(list.begin(), list.end(), std::mt19937(n));
  return list;
}

// Workers that run no block keep their stacks for the next one.
std::vector<std::unique_ptr<Worker>>& idle() {
  static std::vector<std::unique_ptr<Worker>> list;
  return list;
}
std::unique_ptr<Worker> take_worker() {
  if (idle().empty()) idle().push_back(std::make_unique<Worker>());
  std::unique_ptr<Worker> w = std::move(idle().back());
  return idle().pop_back(), std::move(w);
}

// A launch, of which some blocks may have begun.
class Begun {
 public:
  explicit Begun(const Launch& launch) : launch_(launch) {
    check(launch);
    const dim3 grid = launch.grid, block = launch.block;
    const int threads = static_cast<int>(block.x * block.y * block.z);
    blocks_ = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    thread_order_ = ordered(threads, settings().threads);
    block_order_ = ordered(static_cast<int>(blocks_), settings().blocks);
  }

  // Runs the first blocks up to where they wait for the launches ahead.
  void begin_early() {
    for (; next_ < std::min<int64_t>(blocks_, settings().early); ++next_) {
      early_.push_back(take_worker());
      early_.back()->begin(launch_, place(next_), thread_order_, true);
      early_.back()->advance();
    }
  }

  // Runs what is left.
  void finish() {
    for (auto& w : early_) {
      w->let_go();
      w->advance();
      note(w->end());
      idle().push_back(std::move(w));
    }
    const int wanted = static_cast<int>(std::min<int64_t>(blocks_, settings().workers));
    std::vector<std::unique_ptr<Worker>> taken;
    for (int i = 0; i < wanted; ++i) taken.push_back(take_worker());
    std::vector<std::thread> others;
    for (int i = 1; i < wanted; ++i) others.emplace_back([&, i] { work(*taken[i]); });
    work(*taken[0]);
    for (auto& t : others) t.join();
    for (auto& w : taken) idle().push_back(std::move(w));
    if (!failure_.empty()) throw std::runtime_error("emulated kernel: " + failure_);
  }

 private:
  dim3 place(int64_t i) const {
    const int64_t b = block_order_[i];
    const dim3 grid = launch_.grid;
    return dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
  }

  void work(Worker& w) {
    for (int64_t i; (i = next_++) < blocks_;) {
      w.begin(launch_, place(i), thread_order_, false);
      w.advance();
      note(w.end());
    }
  }

  // After a failure no further block begins.
  void note(const std::string& wrong) {
    if (wrong.empty()) return;
    std::lock_guard<std::mutex> guard(failure_lock_);
    failure_ = wrong;
    next_ = blocks_;
  }

  const Launch& launch_;
  int64_t blocks_;
  std::vector<int> thread_order_, block_order_;
  std::vector<std::unique_ptr<Worker>> early_;
  std::atomic<int64_t> next_{0};
  std::mutex failure_lock_;
  std::string failure_;
};

}  // namespace

const char* fibers() { return kFibers; }
Settings& settings() {
  static Settings s;
  return s;
}

const Here& here() { return running->here; }
void sync_block() { worker->sync(); }
void wait_for_launches() { worker->wait_for_launches(); }
void warp_op(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
             WarpOp op) {
  worker->warp_op(name, in, in_bytes, out, out_bytes, op);
}
void* shared_object(const void* site, size_t bytes) { return worker->object(site, bytes); }
void* dynamic_shared() { return worker->dynamic(); }
void fail(const std::string& message) { worker->abandon(message); }

void copy_async(void* to, const void* from, int bytes, int valid) {
  Copy c{static_cast<char*>(to), bytes, {}};
  std::memcpy(c.data, from, valid);
  std::memset(to, 0xff, bytes);
  running->open.push_back(c);
}

void commit_copies() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void wait_copies(int pending_groups) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.data, c.bytes);
    groups.erase(groups.begin());
  }
}

void run_all(const Launches& launches) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  std::unique_ptr<Begun> now, next;
  for (size_t i = 0; i < launches.size(); ++i, now = std::move(next)) {
    if (!now) now = std::make_unique<Begun>(launches[i]);
    if (i + 1 < launches.size() && launches[i + 1].early) {
      next = std::make_unique<Begun>(launches[i + 1]);
      next->begin_early();
    }
    now->finish();
  }
}

}  // namespace ei::emu
