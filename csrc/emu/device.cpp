// device.h without a device: memory is host memory, a stream runs at once, a graph is the list of
// launches that were given while it was recorded.
#include "host/device.h"

#include <chrono>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>

#include "emu.h"

namespace ei::device {

bool built() { return true; }
std::string missing() { return ""; }
std::vector<std::string> architectures() { return {"emulated"}; }
std::string unusable(int index) { return index == 0 ? "" : "there is 1"; }

CudaCall call_on(int) {
  CudaCall call;
  call.multiprocessors = emu::settings().multiprocessors;
  call.compute_capability = emu::settings().compute_capability;
  call.batch_invariant = emu::settings().batch_invariant;
  return call;
}

bool overlaps(int) { return true; }

Use::Use(int index) : before_(index) {}
Use::~Use() = default;

void Free::operator()(char* p) const { ::operator delete[](p, std::align_val_t(256)); }

Memory allocate(int64_t bytes) {
  Memory m(static_cast<char*>(::operator new[](bytes, std::align_val_t(256))));
  poison(m.get(), bytes);
  return m;
}

void poison(char* memory, int64_t bytes) { std::memset(memory, 0xff, bytes); }

bool recording(Stream stream) { return stream != nullptr && !emu::is_stream(stream); }

Stream current() { return emu::current_stream(); }

void order(Stream before, Stream) {
  if (!before) return;  // it ran at once
  const emu::Launches ahead = std::move(*static_cast<emu::Launches*>(before));
  static_cast<emu::Launches*>(before)->clear();
  emu::run_all(ahead);
}

// The stream of a graph is its list of launches; cuda::launch puts them there.
struct Graph::Recorded {
  emu::Launches launches;
};

Graph::Graph() : recorded_(std::make_unique<Recorded>()) {}
Graph::~Graph() = default;
Stream Graph::begin() { return &recorded_->launches; }
void Graph::end() {}
void Graph::run(Stream stream) {
  if (!stream) return emu::run_all(recorded_->launches);
  for (const emu::Launch& l : recorded_->launches)
    static_cast<emu::Launches*>(stream)->push_back(l);
}

struct Clock::Marks {
  std::vector<std::chrono::steady_clock::time_point> times;
};

Clock::Clock(int) : marks_(std::make_unique<Marks>()) {}
Clock::~Clock() = default;
void Clock::mark(Stream) { marks_->times.push_back(std::chrono::steady_clock::now()); }
std::vector<double> Clock::seconds() {
  std::vector<double> found;
  for (size_t i = 1; i < marks_->times.size(); ++i)
    found.push_back(std::chrono::duration<double>(marks_->times[i] - marks_->times[i - 1]).count());
  return found;
}

}  // namespace ei::device
