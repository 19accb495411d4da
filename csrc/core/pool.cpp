#include "pool.h"

#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>

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
}  // namespace

void Pool::Free::operator()(char* p) const { std::free(p); }

Pool::Pool(int threads, Isa isa, bool batch_invariant)
    : isa_(isa), batch_invariant_(batch_invariant) {
  scratch_.resize(threads);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  stop_ = true;
  {
    std::lock_guard<std::mutex> lock(mutex_);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
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
  thunk_(function_, parts_ - static_cast<int64_t>(t & kLeft), thread);
  done_.fetch_add(1, std::memory_order_acq_rel);
  return true;
}

void Pool::share(int64_t parts, Thunk thunk, const void* f) {
  thunk_ = thunk;
  function_ = f;
  parts_ = parts;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(generation << 32 | static_cast<uint64_t>(parts), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
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
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [this] {
      return stop_.load() || (ticket_.load(std::memory_order_seq_cst) & kLeft) != 0;
    });
    sleepers_.fetch_sub(1);
    idle_since = std::chrono::steady_clock::now();
  }
}

void Pool::fail(const std::string& message) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failed_.exchange(true)) failure_ = message;
}

void Pool::check_failure() {
  if (!failed_.load(std::memory_order_acquire)) return;
  std::lock_guard<std::mutex> lock(mutex_);
  failed_ = false;
  throw std::invalid_argument(failure_);
}

}  // namespace ei
