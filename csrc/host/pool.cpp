#include "host/pool.h"

#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <system_error>

namespace ei {
namespace {
constexpr uint64_t kLeft = 0xffffffffu;
constexpr auto kSpin = std::chrono::microseconds(60);

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// How often the line of processes that ends here was forked. Asking for the process id instead
// would be a system call for every op.
std::atomic<int64_t>& forks() {
  static std::atomic<int64_t> count{0};
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return count;
}

// Most parts of one job: a ticket has 32 bits for them.
constexpr int64_t kMostParts = int64_t{1} << 31;

}  // namespace

void Pool::Free::operator()(char* p) const { std::free(p); }

Pool::Pool(int threads, Isa isa, bool batch_invariant)
    : threads_(threads),
      isa_(isa),
      batch_invariant_(batch_invariant),
      process_(forks().load(std::memory_order_relaxed)) {
  scratch_.resize(threads);
  workers_ = std::make_unique<Workers>();
  try {
    start();
  } catch (...) {  // the threads that were started would outlive us
    stop();
    throw;
  }
}

Pool::~Pool() {
  if (forks().load(std::memory_order_relaxed) == process_)
    stop();
  else
    static_cast<void>(workers_.release());
}

void Pool::start() {
  std::vector<std::thread>& threads = workers_->threads;
  threads.reserve(threads_ - 1);
  try {
    for (int i = 1; i < threads_; ++i) threads.emplace_back([this, i] { work(i); });
  } catch (const std::system_error& error) {
    throw std::invalid_argument("pool: threads must be as many as the system starts, got " +
                                std::to_string(threads_) + ": it refused after " +
                                std::to_string(threads.size() + 1) + " (" + error.what() + ")");
  }
}

void Pool::stop() {
  stop_ = true;
  {
    std::lock_guard<std::mutex> lock(workers_->mutex);
  }
  workers_->wake.notify_all();
  for (auto& w : workers_->threads) w.join();
}

std::unique_lock<std::mutex> Pool::hold() {
  if (forks().load(std::memory_order_relaxed) != process_)
    throw std::invalid_argument("pool: process must be the one that made the pool, got process " +
                                std::to_string(getpid()) + " forked from it; make a Pool there");
  return std::unique_lock<std::mutex>(busy_);
}

void Pool::reserve(int64_t bytes) {
  if (bytes <= scratch_bytes_) return;
  bytes = (bytes + 63) / 64 * 64;
  for (auto& s : scratch_) {
    char* p = static_cast<char*>(std::aligned_alloc(64, bytes));
    if (!p) throw std::bad_alloc();
    s.reset(p);
  }
  scratch_bytes_ = bytes;
}

// Takes one part of the current job and runs it; false when none is left. The compare-and-swap
// fails when the job has changed, so a late worker can never touch a newer job's parts unseen.
bool Pool::take(int thread) {
  uint64_t t = ticket_.load(std::memory_order_acquire);
  do {
    if ((t & kLeft) == 0) return false;
  } while (!ticket_.compare_exchange_weak(t, t - 1, std::memory_order_acq_rel));
  // This part is not done, so the job's fields cannot change under us.
  thunk_(function_, first_ + parts_ - static_cast<int64_t>(t & kLeft), thread);
  done_.fetch_add(1, std::memory_order_acq_rel);
  return true;
}

void Pool::share(int64_t parts, Thunk thunk, const void* f) {
  thunk_ = thunk;
  function_ = f;
  for (int64_t first = 0; first < parts; first += kMostParts)
    share_some(first, std::min(kMostParts, parts - first));
}

void Pool::share_some(int64_t first, int64_t parts) {
  first_ = first;
  parts_ = parts;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(generation << 32 | static_cast<uint64_t>(parts), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(workers_->mutex);
    workers_->wake.notify_all();
  }
  while (take(0)) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != parts; ++spins) {
    if (spins < 2000)
      pause_cpu();
    else
      std::this_thread::yield();  // the machine is shared: let a descheduled worker finish
  }
}

void Pool::work(int thread) {
  auto idle_since = std::chrono::steady_clock::now();
  for (int spins = 0; !stop_.load(std::memory_order_relaxed);) {
    bool worked = false;
    while (take(thread)) worked = true;
    if (worked) {
      idle_since = std::chrono::steady_clock::now();
      spins = 0;
      continue;
    }
    pause_cpu();
    if (++spins % 64 != 0 || std::chrono::steady_clock::now() - idle_since < kSpin) continue;
    std::unique_lock<std::mutex> lock(workers_->mutex);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    workers_->wake.wait(lock, [this] {
      return stop_.load() || (ticket_.load(std::memory_order_seq_cst) & kLeft) != 0;
    });
    sleepers_.fetch_sub(1);
    idle_since = std::chrono::steady_clock::now();
  }
}

void Pool::fail(const std::string& message) {
  std::lock_guard<std::mutex> lock(failure_mutex_);
  if (!failed_.exchange(true)) failure_ = message;
}

void Pool::fail_index(const char* op, const char* name, int64_t value, int64_t low, int64_t high,
                      const char* unit, int64_t at) {
  fail(std::string(op) + ": " + name + " must hold values in [" + std::to_string(low) + ", " +
       std::to_string(high) + "], got " + std::to_string(value) + " at " + unit + " " +
       std::to_string(at));
}

void Pool::fail_grain(const char* op, const char* name, int64_t value, int64_t grain,
                      const char* unit, int64_t at) {
  fail(std::string(op) + ": " + name + " must hold multiples of " + std::to_string(grain) +
       ", got " + std::to_string(value) + " at " + unit + " " + std::to_string(at));
}

void Pool::check_failure() {
  if (!failed_.load(std::memory_order_acquire)) return;
  std::lock_guard<std::mutex> lock(failure_mutex_);
  failed_ = false;
  throw std::invalid_argument(failure_);
}

}  // namespace ei
