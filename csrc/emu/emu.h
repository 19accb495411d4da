// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU.
//
// A kernel is compiled by an ordinary C++ compiler with this header in place of the CUDA runtime.
// Every CUDA thread is a fiber (a stack of its own, switched by hand); an operating-system thread
// runs one block at a time, and the blocks of a launch are spread over several such threads. A
// fiber runs until it meets a barrier or an operation of its whole warp; the last one to arrive
// lets all go on. So the order in which threads run between barriers is ours to choose: a kernel
// whose result depends on it (a missing barrier) differs between orders.
//
// What it finds: launches that a driver refuses (blocks, grids, arguments, and shared memory beyond
// what the compute capability has, static and dynamic together), reads of shared memory that was
// never written (it is NaN before every block), cp.async whose wait is missing (the destination is
// NaN until the wait), launches that read too
// early what the one ahead of them writes, divergent barriers and warp operations (reported with
// how many threads stand where), misaligned wide accesses, and, under AddressSanitizer, everything
// out of bounds.
// What it cannot find: the speed; races that no order of whole stretches between barriers shows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace ei::emu {

// In which order the threads of a block, and the blocks of a launch, are run. Descending threads
// also let one warp run ahead of the others, up to the block's next barrier.
enum class Order { ascending, descending, shuffled };

struct Settings {
  Order threads = Order::ascending;
  Order blocks = Order::ascending;
  int workers = 2;  // operating-system threads
  int early = 3;    // blocks of a launch that may begin early which do
  // What the ops are told (CudaCall).
  int multiprocessors = 0;
  int compute_capability = 80;
  bool batch_invariant = false;
};
Settings& settings();

// What switches stacks: "assembly", or "ucontext" where there is none for the processor.
const char* fibers();

// Where the running fiber is.
struct Here {
  dim3 thread, block, block_size, grid_size;
};
const Here& here();

// body() once per CUDA thread. `early`: it may begin before the launch ahead of it has ended.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  std::function<void()> body;
  bool early = false;
  bool told = true;  // that a block may have more shared memory than 48 KiB
  size_t argument_bytes = 0;
  const void* kernel = nullptr;
};
using Launches = std::vector<Launch>;  // what stands for a captured graph

// Most bytes of a block's shared memory on a device of the settings' compute capability, static
// and dynamic together. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
// Capability".
size_t shared_limit(bool told);

// Empty, or what a driver says of the shared memory of a launch whose kernel has static objects.
std::string beyond_shared(const Launch& launch, size_t static_bytes);

// Throws std::runtime_error where a driver refuses a launch whatever its kernel is.
void check(const Launch& launch);

// What a kernel's launches had in common, for tests that compare them with the assembler's word.
struct Listed {
  const void* kernel;
  unsigned threads;
  size_t shared_bytes;
  bool told;
};
// The different launches since the last call. From now on, with `only`, launches are listed and
// checked but not run.
std::vector<Listed> take_list(bool only);

// Streams beside the default one, which is null and runs at once. What number 1 or 2 is given waits
// until another stream is to come after it, or finish_streams() runs a launch of each in turn.
constexpr int kStreams = 2;
Launches& stream(int number);
bool is_stream(const void* launches);  // one of these, not that of a graph
Launches*& current_stream();
void finish_streams();

// Checks a launch, and runs it or appends it to `recording`. What a kernel's static objects add to
// its shared memory is known, and checked, when it runs.
void submit(Launches* recording, const Launch& launch);

// Runs launches in order. Of one that may begin early some blocks run up to their wait before the
// launch ahead of it does any work, so that they see nothing of it. Throws std::runtime_error if a
// thread reports a mistake, the threads of a block wait for each other in vain, or a thread of an
// early launch returns without having waited.
void run_all(const Launches& launches);

// griddepcontrol.wait.
void wait_for_launches();

// __syncthreads().
void sync_block();

// One operation of all 32 lanes: each gives `in`, and gets its `out` from op(in[32], out[32]),
// which runs once, when the last lane has arrived. `name` must be the same string for all lanes.
using WarpOp = void (*)(const void* in, void* out);
void warp_op(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
             WarpOp op);
constexpr size_t kWarpOperand = 64;  // most bytes of one lane's operand or result

template <class Out, class In>
Out warp(const char* name, const In& in, void (*op)(const In*, Out*)) {
  static_assert(sizeof(In) <= kWarpOperand && sizeof(Out) <= kWarpOperand, "operand too large");
  // The function travels with the operand: WarpOp knows no types.
  struct Packed {
    In in;
    void (*op)(const In*, Out*);
  };
  static_assert(sizeof(Packed) <= kWarpOperand + 16, "operand too large");
  const Packed packed{in, op};
  Out out;
  warp_op(name, &packed, sizeof(Packed), &out, sizeof(Out), [](const void* lanes, void* results) {
    const Packed* p = static_cast<const Packed*>(lanes);
    In operands[32];
    for (int i = 0; i < 32; ++i) operands[i] = p[i].in;
    p[0].op(operands, static_cast<Out*>(results));
  });
  return out;
}

// Shared memory: a heap block per object and CUDA block, filled with NaN bytes (0xff).
void* shared_object(const void* site, size_t bytes);
void* dynamic_shared();

// cp.async of `bytes` bytes of which the first `valid` come from `from` and the others are zero.
void copy_async(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_copies(int pending_groups);

// Stops the launch with `message` and the place of the running thread.
[[noreturn]] void fail(const std::string& message);

inline const void* aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(std::string(what) + " of memory that is not aligned to " + std::to_string(bytes) +
         " bytes");
  return p;
}

}  // namespace ei::emu

#define threadIdx (::ei::emu::here().thread)
#define blockIdx (::ei::emu::here().block)
#define blockDim (::ei::emu::here().block_size)
#define gridDim (::ei::emu::here().grid_size)
inline void __syncthreads() { ei::emu::sync_block(); }
