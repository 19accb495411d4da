// The emulator's own test kernels: each is right, or wrong in one way that the emulator must show.
#include <map>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/prim_native.cuh"
#include "selftest.h"

namespace ei::cuda {
namespace {

struct Row {
  float value[64];
};

// Every thread writes its place and reads its neighbour's.
template <bool kBarrier>
__global__ void neighbour(float* out) {
  EI_SHARED(Row, row);
  row.value[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = row.value[(threadIdx.x + 1) % 64];
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void half_a_warp(float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = sum_lanes(1.0f);
}
__global__ void two_operations(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? shuffle_xor<1>(1.0f) : shuffle(1.0f, 0);
}

// Copies 16 bytes per thread through shared memory; the first half of the threads copy zeros.
template <bool kWait>
__global__ void copy_through(const float* in, float* out) {
  EI_DYNAMIC_SHARED(float, room);
  const int at = 4 * threadIdx.x;
  copy_async<16>(room + at, in + at, threadIdx.x >= 16);
  commit_copies();
  if constexpr (kWait) wait_copies<0>();
  for (int i = 0; i < 4; ++i) out[at + i] = room[at + i];
}

__global__ void misaligned(const float* in, float* out) {
  float v[4];
  load(in + 1, v);
  out[threadIdx.x] = v[0];
}

// Shared memory that nobody wrote, in every block.
__global__ void unwritten(float* out) {
  EI_SHARED(Row, row);
  EI_DYNAMIC_SHARED(float, room);
  const float seen = row.value[0] + room[0];
  __syncthreads();
  row.value[threadIdx.x] = room[threadIdx.x] = 1.0f;
  out[blockIdx.x] = seen;
}

__global__ void beyond_shared(float* out) {
  EI_DYNAMIC_SHARED(float, room);
  out[threadIdx.x] = room[threadIdx.x];  // the launch gives half of it
}

// d = a b for a [16, 16] and b [16, 8], both row-major.
__global__ void multiply(const bf16* a, const bf16* b, float* d) {
  struct Tiles {
    bf16 a[16][16], b[16][8];
  };
  EI_SHARED(Tiles, tile);
  for (int i = threadIdx.x; i < 256; i += kWarp) tile.a[i / 16][i % 16] = a[i];
  for (int i = threadIdx.x; i < 128; i += kWarp) tile.b[i / 8][i % 8] = b[i];
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[4];
  load_matrices(fa, &tile.a[lane % 16][lane / 16 * 8]);
  load_matrices<true>(fb, &tile.b[lane % 16][0]);  // the upper lanes' matrices go unused
  float total[4] = {};
  multiply_add(total, fa, fb[0], fb[1]);
  for (int j = 0; j < 4; ++j) d[(lane / 4 + j / 2 * 8) * 8 + lane % 4 * 2 + j % 2] = total[j];
}

__global__ void votes(uint32_t* out) { out[threadIdx.x] = ballot(threadIdx.x % 3 == 0); }

// Which thread, and which block, ran how many others after the first.
struct Clock {
  int* ticks;
};
__global__ void order_of(Clock clock, int* out) {
  out[blockIdx.x * 64 + threadIdx.x] = clock.ticks[0]++;
}

__global__ void multiply_codes(const uint32_t* a, const uint32_t* b, const uint32_t* scale_a,
                               const uint32_t* scale_b, int pair_a, int lane_b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[4];
  for (int i = 0; i < 4; ++i) fa[i] = a[lane * 4 + i];
  float total[4] = {};
  multiply_add_nvfp4(total, fa, b[lane * 2], b[lane * 2 + 1], scale_a[lane], scale_b[lane], pair_a,
                     lane_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = total[i];
}

constexpr int kAtom = 1024;
EI_DEVICE char* aligned_room(char* room) {
  return room + (kAtom - shared_address(room) % kAtom) % kAtom;
}

template <int N>
__global__ void multiply_group(const uint16_t* memory, int words, uint64_t a, uint64_t b,
                               float* sums) {
  EI_DYNAMIC_SHARED(char, dynamic);
  uint16_t* room = reinterpret_cast<uint16_t*>(aligned_room(dynamic));
  for (int i = threadIdx.x; i < words; i += 128) room[i] = memory[i];
  fence_products();
  __syncthreads();
  const uint64_t begin = shared_address(room) >> 4;
  float d[N / 8][4] = {};
  begin_products();
  multiply_add_async(d, a + begin, b + begin);
  commit_products();
  wait_products<0>(d);
  for (int i = 0; i < N / 2; ++i) sums[threadIdx.x * (N / 2) + i] = d[i / 4][i % 4];
}

__global__ void describe(int atom, int column, uint64_t* out) {
  EI_DYNAMIC_SHARED(char, dynamic);
  const char* room = aligned_room(dynamic);
  if (threadIdx.x == 0)
    *out = matrix_descriptor(room + atom * kAtom, column) - (shared_address(room) >> 4);
}

// Sums of 16 products of ones, used or their matrices overwritten before they were waited for.
enum class Mistake { none, early, overwritten };
template <Mistake kMistake>
__global__ void hasty(float* out) {
  EI_DYNAMIC_SHARED(char, dynamic);
  char* room = aligned_room(dynamic);
  const auto fill = [&](float value) {
    bf16* values = reinterpret_cast<bf16*>(room);
    for (int i = threadIdx.x; i < 64 * 64 + 128 * 64; i += 128) from_float(value, values[i]);
    fence_products();
    __syncthreads();
  };
  fill(1.0f);
  float d[16][4] = {};
  begin_products();
  multiply_add_async(d, matrix_descriptor(room, 0), matrix_descriptor(room + 64 * 128, 0));
  commit_products();
  if constexpr (kMistake == Mistake::early) out[threadIdx.x] = d[0][0];
  if constexpr (kMistake == Mistake::overwritten) fill(2.0f);
  wait_products<0>(d);
  if constexpr (kMistake != Mistake::early) out[threadIdx.x] = d[0][0];
}

std::string compare(const std::vector<float>& got, const std::vector<float>& want) {
  for (size_t i = 0; i < want.size(); ++i)
    if (!(got[i] == want[i]))
      return "at " + std::to_string(i) + ": " + std::to_string(got[i]) + " instead of " +
             std::to_string(want[i]);
  return "ok";
}

template <bool kBarrier>
std::string run_neighbour() {
  std::vector<float> out(64), want(64);
  for (int i = 0; i < 64; ++i) want[i] = static_cast<float>((i + 1) % 64);
  launch({}, neighbour<kBarrier>, dim3(1), 64, 0, out.data());
  return compare(out, want);
}

template <bool kWait>
std::string run_copy() {
  std::vector<Bytes16> in(32);
  std::vector<float> out(128), want(128);
  float* values = reinterpret_cast<float*>(in.data());
  for (int i = 0; i < 128; ++i) values[i] = i + 1.0f, want[i] = i < 64 ? 0.0f : i + 1.0f;
  launch({}, copy_through<kWait>, dim3(1), 32, 512, static_cast<const float*>(values), out.data());
  return compare(out, want);
}

std::string run_multiply() {
  std::vector<bf16> a(256), b(128);
  std::vector<float> d(128), want(128);
  for (int i = 0; i < 256; ++i) from_float(static_cast<float>(i % 13 - 6), a[i]);
  for (int i = 0; i < 128; ++i) from_float(static_cast<float>(i % 7 - 3), b[i]);
  for (int i = 0; i < 128; ++i)
    for (int k = 0; k < 16; ++k)
      want[i] += to_float(a[i / 8 * 16 + k]) * to_float(b[k * 8 + i % 8]);
  launch({}, multiply, dim3(1), 32, 0, static_cast<const bf16*>(a.data()),
         static_cast<const bf16*>(b.data()), d.data());
  return compare(d, want);
}

template <Mistake kMistake>
std::string run_products() {
  std::vector<float> out(128);
  launch({}, hasty<kMistake>, dim3(1), 128, 25 * kAtom, out.data());
  return compare(out, std::vector<float>(128, 16.0f));
}

std::string run_votes() {
  std::vector<uint32_t> out(64);
  launch({}, votes, dim3(1), 64, 0, out.data());
  for (int i = 0; i < 64; ++i) {
    uint32_t want = 0;
    for (int l = 0; l < 32; ++l) want |= static_cast<uint32_t>((i / 32 * 32 + l) % 3 == 0) << l;
    if (out[i] != want) return "wrong vote in thread " + std::to_string(i);
  }
  return "ok";
}

// The tick of thread 0 of block 0 and of thread 63 of block 2, out of 3 blocks of 64.
std::string run_order() {
  int ticks = 0;
  std::vector<int> out(192);
  const int workers = emu::settings().workers;
  emu::settings().workers = 1;
  launch({}, order_of, dim3(3), 64, 0, Clock{&ticks}, out.data());
  emu::settings().workers = workers;
  return std::to_string(out[0]) + " " + std::to_string(out[191]);
}

std::string run_unwritten() {
  std::vector<float> out(3);
  launch({}, unwritten, dim3(3), 64, 256, out.data());
  for (float v : out)
    if (v == v) return "a block saw " + std::to_string(v) + " in memory that it never wrote";
  return "ok";
}

std::string run_beyond() {
  std::vector<float> out(64);
  launch({}, beyond_shared, dim3(1), 64, 128, out.data());
  return "ok";
}

template <void (*kKernel)()>
std::string run_plain() {
  launch({}, kKernel, dim3(1), 64, 0);
  return "ok";
}
template <void (*kKernel)(float*)>
std::string run_output() {
  std::vector<float> out(64);
  launch({}, kKernel, dim3(1), 64, 0, out.data());
  return "ok";
}
std::string run_misaligned() {
  std::vector<Bytes16> in(4);
  std::vector<float> out(32);
  launch({}, misaligned, dim3(1), 32, 0, reinterpret_cast<const float*>(in.data()), out.data());
  return "ok";
}
// ---- what a driver refuses

struct Kilobyte {
  char bytes[1024];
};
__global__ void both_kinds() {
  EI_SHARED(Kilobyte, fixed);
  EI_DYNAMIC_SHARED(char, room);
  fixed.bytes[threadIdx.x] = room[threadIdx.x] = 0;
}
struct Wide {
  char bytes[4100];
};
__global__ void wide(Wide) {}
__global__ void nothing() {}
__global__ void count_row(int rows, int* seen) {
  const int64_t r = row_of_grid();
  if (r < rows && threadIdx.x == 0) ++seen[r];
}

// 48 KiB of dynamic shared memory and one more of static; kTold: as launches of the library are.
template <bool kTold>
std::string run_both_kinds() {
  if (kTold)
    launch({}, both_kinds, dim3(2), 64, 48 * 1024);
  else
    emu::run_all({emu::Launch{dim3(2), dim3(64), 48 * 1024, both_kinds, false, false}});
  return "ok";
}
// All that a block may have, and `more` bytes of dynamic memory.
template <int kMore>
std::string run_all_shared() {
  launch({}, both_kinds, dim3(2), 64, static_cast<int64_t>(emu::shared_limit(true)) + kMore);
  return "ok";
}
std::string run_wide() {
  launch({}, wide, dim3(1), 32, 0, Wide());
  return "ok";
}
std::string run_tall() {
  launch({}, nothing, dim3(1, 65536), 32, 0);
  return "ok";
}
std::string run_rows() {
  constexpr int kCount = 65537;
  std::vector<int> seen(kCount);
  launch({}, count_row, grid_of_rows(1, kCount), 32, 0, kCount, seen.data());
  for (int n : seen)
    if (n != 1) return "a row was met " + std::to_string(n) + " times";
  return "ok";
}

// ---- launches that overlap

__global__ void produce(float* x) {
  begin_kernel();
  x[blockIdx.x * 64 + threadIdx.x] = 1.0f;
}
enum class Reads { after, before, without };  // its wait
template <Reads kReads>
__global__ void follow(const float* x, float* out) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  float v = x[i];
  if (kReads != Reads::without) begin_kernel();
  if (kReads == Reads::after) v = x[i];
  out[i] = v;
}
template <Reads kReads>
std::string run_follow() {
  std::vector<float> x(256), out(256);
  emu::Launches launches;
  CudaCall call;
  call.stream = &launches, call.dependent_launch = true;
  const float* in = x.data();
  launch_early(call, produce, dim3(4), 64, 0, x.data());
  launch_early(call, follow<kReads>, dim3(4), 64, 0, in, out.data());
  emu::run_all(launches);
  for (float v : out)
    if (v != 1.0f) return "a block saw " + std::to_string(v);
  return "ok";
}

std::string run_half_block() {
  launch({}, half_a_barrier, dim3(1), 48, 0);
  return "ok";
}

}  // namespace
}  // namespace ei::cuda

namespace ei::emu {

std::string selftest(const std::string& name) {
  using namespace ei::cuda;
  static const std::map<std::string, std::string (*)()> tests = {
      {"barrier", run_neighbour<true>},
      {"missing_barrier", run_neighbour<false>},
      {"divergent_barrier", run_plain<half_a_barrier>},
      {"divergent_warp", run_output<half_a_warp>},
      {"two_operations", run_output<two_operations>},
      {"copy", run_copy<true>},
      {"missing_wait", run_copy<false>},
      {"misaligned", run_misaligned},
      {"unwritten_shared", run_unwritten},
      {"beyond_shared", run_beyond},
      {"multiply", run_multiply},
      {"votes", run_votes},
      {"products", run_products<Mistake::none>},
      {"products_early", run_products<Mistake::early>},
      {"products_overwritten", run_products<Mistake::overwritten>},
      {"order", run_order},
      {"partial_warp", run_half_block},
      {"static_and_dynamic", run_both_kinds<true>},
      {"static_and_dynamic_untold", run_both_kinds<false>},
      {"all_shared", run_all_shared<-1024>},
      {"static_beyond_all", run_all_shared<-1008>},
      {"dynamic_beyond_all", run_all_shared<1>},
      {"wide_arguments", run_wide},
      {"tall_grid", run_tall},
      {"rows_of_grid", run_rows},
      {"overlap", run_follow<Reads::after>},
      {"early_read", run_follow<Reads::before>},
      {"missing_launch_wait", run_follow<Reads::without>},
  };
  const auto found = tests.find(name);
  if (found == tests.end()) throw std::invalid_argument("no emulator test named " + name);
  return found->second();
}

std::vector<float> multiply_add_nvfp4(const std::vector<uint32_t>& a,
                                      const std::vector<uint32_t>& b,
                                      const std::vector<uint32_t>& scale_a,
                                      const std::vector<uint32_t>& scale_b, int pair_a,
                                      int lane_b) {
  if (a.size() != 128 || b.size() != 64 || scale_a.size() != 32 || scale_b.size() != 32)
    throw std::invalid_argument("registers of 32 lanes are needed");
  std::vector<float> d(128);
  cuda::launch({}, cuda::multiply_codes, dim3(1), 32, 0, a.data(), b.data(), scale_a.data(),
               scale_b.data(), pair_a, lane_b, d.data());
  return d;
}

std::vector<float> multiply_add_async(const std::vector<uint16_t>& memory, uint64_t a, uint64_t b,
                                      int columns) {
  if (columns != 128 && columns != 256) throw std::invalid_argument("128 or 256 columns");
  std::vector<float> sums(64 * columns);
  auto* kernel = columns == 128 ? cuda::multiply_group<128> : cuda::multiply_group<256>;
  cuda::launch({}, kernel, dim3(1), 128, memory.size() * 2 + cuda::kAtom, memory.data(),
               static_cast<int>(memory.size()), a, b, sums.data());
  return sums;
}

uint64_t matrix_descriptor(int atom, int column) {
  uint64_t found = 0;
  cuda::launch({}, cuda::describe, dim3(1), 32, (atom + 2) * cuda::kAtom, atom, column, &found);
  return found;
}

}  // namespace ei::emu
