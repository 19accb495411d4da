#include "wgmma.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "emu.h"

namespace ei::emu {
namespace {

constexpr uint64_t kAtom = 1024;  // bytes after which every swizzle repeats

uint64_t base() { return reinterpret_cast<uintptr_t>(dynamic_shared()) / kAtom * kAtom; }

// A field of a descriptor: 14 bits from `bit` on, of a number whose lowest four bits are left out.
uint64_t field(uint64_t descriptor, int bit) { return (descriptor >> bit & 0x3fff) << 4; }

struct Product {
  float* d;
  int count;
  uint64_t a, b;
};
// What one thread has begun.
struct Pending {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<float*, std::vector<float>> sums;  // what d will hold
};

// Of the running thread; its place in the worker tells it from all others. It is empty again when
// nothing is under way.
Pending& mine() {
  static std::mutex lock;
  static std::map<const Here*, Pending> all;
  std::lock_guard<std::mutex> guard(lock);
  return all[&here()];
}

void multiply(const Product& p, std::vector<float>& sums) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int columns = p.count * 2;
  float a[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      a[half][k] = matrix_value(p.a, thread / 32 * 16 + lane / 4 + half * 8, k);
  for (int n = 0; n < columns; ++n) {
    if (n % 8 / 2 != lane % 4) continue;
    float total[2] = {};
    for (int k = 0; k < 16; ++k) {
      const float b = matrix_value(p.b, n, k);
      for (int half = 0; half < 2; ++half) total[half] += a[half][k] * b;
    }
    for (int half = 0; half < 2; ++half) sums[n / 8 * 4 + half * 2 + n % 2] += total[half];
  }
}

}  // namespace

uint64_t shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p) - base(); }

float matrix_value(uint64_t descriptor, int row, int column) {
  const uint64_t start = field(descriptor, 0), leading = field(descriptor, 16);
  const uint64_t stride = field(descriptor, 32);
  if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset");
  // Modes 0 to 3: none, 128, 64 and 32 bytes.
  const int mode = static_cast<int>(descriptor >> 62);
  const int bits = mode == 0 ? 0 : 4 - mode, width = 16 << bits;
  // Eight rows of `width` bytes are one piece, `stride` from those of the next eight rows.
  // Without swizzling a piece is 16 bytes wide, and `leading` goes to the next eight columns.
  const int byte = column * 2;
  const uint64_t piece = mode == 0 ? byte / 16 * leading : 0;
  uint64_t at = start + row / 8 * stride + row % 8 * width + piece + (mode == 0 ? byte % 16 : byte);
  // As many bits from the seventh on change those from the fourth on.
  at ^= (at >> 7 & ((1u << bits) - 1)) << 4;
  uint16_t value;
  std::memcpy(&value, reinterpret_cast<const char*>(base() + at), 2);
  const uint32_t word = static_cast<uint32_t>(value) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}

void begin_product(float* d, int count, uint64_t a, uint64_t b) {
  Pending& p = mine();
  if (!p.sums.count(d)) {
    p.sums[d].assign(d, d + count);
    std::fill(d, d + count, std::nanf(""));
  }
  p.open.push_back({d, count, a, b});
}

void commit_products() {
  Pending& p = mine();
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}

void wait_products(int pending_groups) {
  Pending& p = mine();
  for (; static_cast<int>(p.groups.size()) > pending_groups; p.groups.pop_front())
    for (const Product& one : p.groups.front()) multiply(one, p.sums[one.d]);
  if (!p.groups.empty() || !p.open.empty()) return;
  for (const auto& [d, sums] : p.sums) std::copy(sums.begin(), sums.end(), d);
  p.sums.clear();
}

}  // namespace ei::emu
