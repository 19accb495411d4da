// What a driver refuses of a launch, the list of launches, and the streams of tests (emu.h).
#include <mutex>
#include <set>
#include <stdexcept>
#include <tuple>

#include "emu.h"

namespace ei::emu {
namespace {

constexpr size_t kMostArgumentBytes = 4096;  // newer drivers take more

struct List {
  std::mutex lock;
  std::set<std::tuple<const void*, unsigned, size_t, bool>> seen;
  bool only = false;
};
List& list() {
  static List l;
  return l;
}

}  // namespace

size_t shared_limit(bool told) {
  if (!told) return 48 * 1024;
  const int capability = settings().compute_capability;
  if (capability == 80 || capability == 87) return 163 * 1024;
  return (capability >= 90 && capability < 120 ? 227 : 99) * size_t{1024};
}

std::string beyond_shared(const Launch& launch, size_t static_bytes) {
  const size_t most = shared_limit(launch.told);
  if (launch.shared_bytes + static_bytes <= most) return "";
  return "a block must have at most " + std::to_string(most) + " bytes of shared memory, got " +
         std::to_string(launch.shared_bytes) + " dynamic and " + std::to_string(static_bytes) +
         " static";
}

void check(const Launch& launch) {
  const auto refuse = [](const std::string& what, const std::string& got) {
    throw std::runtime_error("CUDA kernel launch: " + what + ", got " + got);
  };
  const dim3 grid = launch.grid;
  const int64_t threads = static_cast<int64_t>(launch.block.x) * launch.block.y * launch.block.z;
  if (threads % 32 || threads < 32 || threads > 1024)
    refuse("a block must have 32 to 1024 threads in whole warps", std::to_string(threads));
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535)
    refuse(
        "a grid must have 1 to 2147483647 blocks along x, 1 to 65535 along y and z",
        std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  if (launch.argument_bytes > kMostArgumentBytes)
    refuse("arguments must have at most " + std::to_string(kMostArgumentBytes) + " bytes",
           std::to_string(launch.argument_bytes));
  if (const std::string wrong = beyond_shared(launch, 0); !wrong.empty())
    throw std::runtime_error("CUDA kernel launch: " + wrong);
}

std::vector<Listed> take_list(bool only) {
  std::lock_guard<std::mutex> guard(list().lock);
  std::vector<Listed> found;
  for (const auto& [kernel, threads, bytes, told] : list().seen)
    found.push_back({kernel, threads, bytes, told});
  list().seen.clear();
  list().only = only;
  return found;
}

Launches& stream(int number) {
  static Launches all[kStreams];
  if (number < 1 || number > kStreams) throw std::invalid_argument("streams are 1 and 2");
  return all[number - 1];
}
bool is_stream(const void* launches) { return launches == &stream(1) || launches == &stream(2); }
Launches*& current_stream() {
  static Launches* current = nullptr;
  return current;
}
void finish_streams() {
  const Launches first = std::move(stream(1)), second = std::move(stream(2));
  stream(1).clear(), stream(2).clear();
  for (size_t i = 0; i < std::max(first.size(), second.size()); ++i)
    for (const Launches* one : {&first, &second})
      if (i < one->size()) run_all({(*one)[i]});
}

void submit(Launches* recording, const Launch& launch) {
  check(launch);
  {
    std::lock_guard<std::mutex> guard(list().lock);
    list().seen.insert({launch.kernel, launch.block.x, launch.shared_bytes, launch.told});
    if (list().only) return;
  }
  if (recording)
    recording->push_back(launch);
  else
    run_all({launch});
}

}  // namespace ei::emu
