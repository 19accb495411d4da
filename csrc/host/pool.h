// A fixed set of worker threads that share the parts of one kernel at a time.
//
// run(parts, f) calls f(part, thread) once for every part in [0, parts), on the caller and the
// workers, and returns when all are done. Which thread takes a part never changes a result: parts
// are independent and kernels fix their own order of summation. Workers spin for a short while
// after work, then sleep. A pool of one thread starts none.
//
// A pool belongs to the process that made it: in one that was forked from it there are no workers,
// and whoever held its locks is gone. There it can be destroyed, and nothing else.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "host/isa.h"

namespace ei {

class Pool {
 public:
  // `batch_invariant`: CUDA ops keep to the order of summation that is the same for any number of
  // rows (on the CPU there is no other).
  Pool(int threads, Isa isa, bool batch_invariant = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  Isa isa() const { return isa_; }
  bool batch_invariant() const { return batch_invariant_; }

  template <class F>
  void run(int64_t parts, const F& f) {
    if (parts <= 1 || threads_ == 1) {
      for (int64_t i = 0; i < parts; ++i) f(i, 0);
      return;
    }
    share(
        parts,
        [](const void* g, int64_t part, int thread) { (*static_cast<const F*>(g))(part, thread); },
        &f);
  }

  // f(begin, end, thread) on ranges that make up [0, count), for work that streams through memory:
  // long ones first, so that a thread starts anew rarely, then shorter ones to end together. With
  // one thread it is one range.
  template <class F>
  void run_ranges(int64_t count, const F& f) {
    if (threads() == 1) {
      if (count > 0) f(int64_t{0}, count, 0);
      return;
    }
    constexpr int kMost = 2048;
    int64_t begin[kMost + 1], at = 0;
    int ranges = 0;
    while (at < count) {
      begin[ranges++] = at;
      const int64_t left = count - at;
      at += ranges == kMost ? left : std::max<int64_t>(1, left / (2 * threads()));
    }
    begin[ranges] = count;
    run(ranges, [&](int64_t i, int thread) { f(begin[i], begin[i + 1], thread); });
  }

  // Scratch memory of one thread, 64-byte aligned, of the size last reserved.
  char* scratch(int thread) { return scratch_[thread].get(); }
  // Grows every thread's scratch. Called while arguments are checked, never by a kernel.
  void reserve(int64_t bytes);

  // Held by whoever runs kernels on this pool, so that two Python threads may share one. Refused
  // in a forked process.
  std::unique_lock<std::mutex> hold();

  // Called by a kernel that finds bad data; the first message is thrown by check_failure().
  void fail(const std::string& message);
  // "<op>: <name> must hold values in [low, high], got <value> at <unit> <at>".
  void fail_index(const char* op, const char* name, int64_t value, int64_t low, int64_t high,
                  const char* unit, int64_t at);
  // "<op>: <name> must hold multiples of <grain>, got <value> at <unit> <at>".
  void fail_grain(const char* op, const char* name, int64_t value, int64_t grain, const char* unit,
                  int64_t at);
  void check_failure();

 private:
  using Thunk = void (*)(const void*, int64_t, int);
  // What workers sleep on. Apart, so that a forked process can leave it where it is: its locks and
  // waiters are those of threads that are not there.
  struct Workers {
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
  };
  void share(int64_t parts, Thunk thunk, const void* f);
  void share_some(int64_t first, int64_t parts);
  void start();
  void stop();
  void work(int thread);
  bool take(int thread);

  struct Free {
    void operator()(char* p) const;
  };
  int threads_;
  Isa isa_;
  bool batch_invariant_;
  const int64_t process_;  // number of forks that lead to the one it belongs to
  // The current job. Written before its parts are published in `ticket_`.
  Thunk thunk_ = nullptr;
  const void* function_ = nullptr;
  int64_t first_ = 0, parts_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};  // generation << 32 | parts not yet taken
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  std::mutex busy_;
  std::unique_ptr<Workers> workers_;
  std::vector<std::unique_ptr<char, Free>> scratch_;
  int64_t scratch_bytes_ = 0;
  std::mutex failure_mutex_;
  std::atomic<bool> failed_{false};
  std::string failure_;
};

}  // namespace ei
