// Computes: ssm_scan (ssm_scan.h). bfloat16: in chunks of 64 tokens on tensor cores. With a_t the
//   logarithm of the decay, c_t its sum from the chunk's first token to t, and h the state before
//   it,
//     y_i = exp(c_i) C_i h + sum over j <= i of (C_i . B_j) exp(c_i - c_j) dt_j x_j + D x_i
//     h'  = exp(c_63) h + sum over j of (exp(c_63 - c_j) dt_j x_j) B_j^T
//   float32, and sizes beyond the limits: token by token (ssm.cuh), equal in bits to ssm_step.
// Layout: the state of a head stays in the registers of four warps (16 of P rows each, as
//   accumulators of the update) from the first to the last chunk; for C h it is rounded to bfloat16
//   in shared memory. The update itself keeps float: dt x is split into three bfloat16 terms, B is
//   exact. Sums c are made in double and kept as two floats, so that differences of large sums stay
//   exact.
// Work split: a block per (head, sequence), walking through its chunks; the next chunk arrives
//   (cp.async) while this one is computed. The scores C B^T of a warp end at its own diagonal.
//   Where that gives too few blocks for the device, and sequences have 1024 tokens or more on the
//   average, they are cut into segments of 512 tokens, which end at multiples of 64 of the whole
//   sequence: (1) a block per (head, segment but the last) makes the state at its end from zero,
//   without outputs; (2) a thread per 4 values of a state goes through the segments of a sequence,
//   h = decay of the segment * h + its end, and leaves where each begins in its place; (3) the scan
//   of all segments at once. Each sequence is cut by its own tokens alone, but whether any is
//   follows from the shapes of x and slots and from the device. Under batch_invariant none is: a
//   sum over segments has other bits, and a prompt may be cut into passes at any multiple of 64.
//   Token by token there are P / 16 times as many blocks, and an end from zero would cost what the
//   scan does: no segments.
// Order: chunks ascending; they end at multiples of 64 tokens of the whole sequence, where a
//   float16 state is rounded. Segments ascending; where one ends a float16 state is rounded too,
//   but (1) rounds nothing, so such a state goes through fewer roundings than without segments.
// Shared memory: 97 KiB: two chunks of x, B and C, and the rounded state.
// Workspace: of every segment a state and its decay in float (T / 512 + 2 S segments).
// Limits: chunks take P up to 64, N up to 128 and x, B, C, y whose rows start at multiples of 16
//   bytes; in all, P and N are multiples of 16, N at most 256, the state starts at multiples of 16
//   bytes.
// Speed: not yet measured on a GPU. Floor: x, B, C, dt read and y written once. Segments add about
//   a third of the products, and their states (32 KiB each at 64 x 128) four times to the traffic.
// Source: Dao and Gu, "Transformers are SSMs", section 6 (the chunked form, states passed between
//   chunks).
#include "chunks.cuh"
#include "cuda/launch.cuh"

namespace ei::cuda {
namespace {

constexpr int kThreads = kScanThreads;
constexpr int kFitting = 2;  // blocks that shared memory lets run side by side on a multiprocessor

// ---- chunks on tensor cores

// Whether sequence s has a state and a token, and its width the head.
EI_DEVICE bool scanned(const SsmArgs& a, int64_t s, int head) {
  const int32_t slot = a.slots.ptr<int32_t>()[s];
  const int32_t* cu = a.cu_seqlens.ptr<int32_t>() + s;
  if (slot < 0 || head >= active_size(a.seq_width, a.h_sizes, s, a.state.shape[1])) return false;
  return cu[0] != cu[1];
}
template <class State>
EI_DEVICE State* state_of(const SsmArgs& a, int64_t s, int head) {
  return a.state.ptr<State>() + a.slots.ptr<int32_t>()[s] * a.state.stride[0] +
         head * a.state.shape[2] * a.state.shape[3];
}

// y of the tokens of b, and h after them. A float16 state is rounded at the end of every
// chunk and kept at `kept`, of State or float: it goes through memory, rows after rows, so that no
// registers spill.
template <class State, class Kept>
EI_DEVICE void walk(const Head& b, WarpState& h, Kept* kept) {
  ChunkShared& shared = b.shared;
  b.stage(b.begin, shared.inputs[0]);
  commit_copies();
  int now = 0;
  for (int first = b.begin, next; first < b.end; first = next, now ^= 1) {
    next = b.stop(first);
    wait_copies<0>();
    __syncthreads();  // this chunk is there for all, and all have left the one before
    if (next < b.end) b.stage(next, shared.inputs[now ^ 1]);
    commit_copies();
    if (b.warp == 0) b.time_steps(first);
    h.share(b);
    __syncthreads();
    const ChunkInputs& in = shared.inputs[now];
    WarpOutput y;
    y.from_state(b, in);
    y.from_chunk(b, in);
    y.write(b, in, first);
    sync_warp();  // nothing of the update is begun before: its registers would spill
    if (b.warp * 16 < b.P) h.update(b, in);
    if constexpr (sizeof(State) == 2) {
      h.write(b, kept, state_key(b.a, b.shift + next, b.head));
      sync_warp();
      h.read(b, kept);
    }
  }
}

template <class State>
__global__ void __launch_bounds__(kThreads) scan_chunks(const __grid_constant__ SsmArgs a) {
  EI_DYNAMIC_SHARED(ChunkShared, shared);
  const int64_t s = blockIdx.y;
  if (!scanned(a, s, blockIdx.x)) return;
  const Head b(a, *shared, blockIdx.x, s);
  State* state = state_of<State>(a, s, b.head);
  WarpState h;
  h.read(b, state);
  walk<State>(b, h, state);
  if constexpr (sizeof(State) == 4) h.write(b, state);
}

// ---- segments

constexpr int kSegment = 512;  // tokens; whole chunks

// Where the segments of all sequences keep their states.
struct Segments {
  int most;                // of one sequence; 0: sequences are not cut
  float *states, *decays;  // [all][H][P * N], [all][H]
};

// The segments of one sequence.
struct Cut {
  int begin, end, lead;  // lead: tokens of the first chunk that were read before
  int count;
  int64_t index;  // of its first segment among all

  EI_DEVICE Cut(const SsmArgs& a, int64_t s) {
    const int32_t* cu = a.cu_seqlens.ptr<int32_t>() + s;
    begin = cu[0];
    end = cu[1];
    lead = static_cast<int>(read_before(a, s) % kChunk);
    count = (end - begin + lead + kSegment - 1) / kSegment;
    // The sequences before this one have at most one segment per 512 tokens and two each.
    index = begin / kSegment + 2 * s;
  }
  EI_DEVICE int first(int k) const { return k == 0 ? begin : begin - lead + k * kSegment; }
  EI_DEVICE int last(int k) const { return min(end, begin - lead + (k + 1) * kSegment); }
};

// States where all segments but the last ones end, from zero where they begin.
__global__ void __launch_bounds__(kThreads)
    end_states(const __grid_constant__ SsmArgs a, const __grid_constant__ Segments g) {
  EI_DYNAMIC_SHARED(ChunkShared, shared);
  const int64_t s = blockIdx.z;
  const int k = blockIdx.y;
  if (!scanned(a, s, blockIdx.x)) return;
  const Cut cut(a, s);
  if (k + 1 >= cut.count) return;
  Head b(a, *shared, blockIdx.x, s);
  b.narrow(cut.first(k), cut.last(k));
  WarpState h = {};
  double faded = 0.0;
  b.stage<false>(b.begin, shared->inputs[0]);
  commit_copies();
  int now = 0;
  for (int first = b.begin, next; first < b.end; first = next, now ^= 1) {
    next = b.stop(first);
    wait_copies<0>();
    __syncthreads();  // as in walk()
    if (next < b.end) b.stage<false>(next, shared->inputs[now ^ 1]);
    commit_copies();
    if (b.warp == 0) b.time_steps(first);
    __syncthreads();
    faded += static_cast<double>(shared->high[kChunk - 1]) + shared->low[kChunk - 1];
    if (b.warp * 16 < b.P) h.update(b, shared->inputs[now]);
  }
  const int64_t at = (cut.index + k) * gridDim.x + b.head;
  h.write(b, g.states + at * b.P * b.N);
  if (threadIdx.x == 0) g.decays[at] = expf(static_cast<float>(faded));
}

// The state of every segment becomes that where it begins.
template <class State>
__global__ void __launch_bounds__(kThreads)
    begin_states(const __grid_constant__ SsmArgs a, const __grid_constant__ Segments g) {
  const int64_t s = blockIdx.z;
  const int head = blockIdx.y;
  const int size = static_cast<int>(a.state.shape[2] * a.state.shape[3]);
  const int value = (blockIdx.x * kThreads + threadIdx.x) * 4;
  if (value >= size || !scanned(a, s, head)) return;
  const Cut cut(a, s);
  float h[4];
  load_floats(state_of<State>(a, s, head) + value, h);
  for (int k = 0; k < cut.count; ++k) {
    const int64_t at = (cut.index + k) * gridDim.y + head;
    float end[4] = {}, decay = 0.0f;
    if (k + 1 < cut.count) {  // the last one's end is left to the scan
      load_floats(g.states + at * size + value, end);
      decay = g.decays[at];
    }
    store(g.states + at * size + value, h);
    EI_UNROLL
    for (int i = 0; i < 4; ++i) {
      h[i] = fused(decay, h[i], end[i]);
      if constexpr (sizeof(State) == 2)
        h[i] = rounded_state(
            h[i], state_key(a, read_before(a, s) + cut.last(k) - cut.begin, head) + value + i);
    }
  }
}

template <class State>
__global__ void __launch_bounds__(kThreads, kFitting)
    scan_segments(const __grid_constant__ SsmArgs a, const __grid_constant__ Segments g) {
  EI_DYNAMIC_SHARED(ChunkShared, shared);
  const int64_t s = blockIdx.z;
  const int k = blockIdx.y;
  if (!scanned(a, s, blockIdx.x)) return;
  const Cut cut(a, s);
  if (k >= cut.count) return;
  Head b(a, *shared, blockIdx.x, s);
  b.narrow(cut.first(k), cut.last(k));
  float* kept = g.states + ((cut.index + k) * gridDim.x + b.head) * b.P * b.N;
  WarpState h;
  h.read(b, kept);
  walk<State>(b, h, kept);
  // Asked anew rather than remembered: there is no register to spare in the loop.
  if (b.end == a.cu_seqlens.ptr<int32_t>()[s + 1]) h.write(b, state_of<State>(a, s, b.head));
}

bool in_chunks(const SsmArgs& a) {
  return a.x.dtype == DType::bf16 && a.state.shape[2] <= kMostP && a.state.shape[3] <= kMostN;
}

int64_t all_segments(const SsmArgs& a) { return a.x.shape[0] / kSegment + 2 * a.slots.shape[0]; }

Segments make_segments(const SsmArgs& a, const CudaCall& call) {
  const int64_t T = a.x.shape[0], S = a.slots.shape[0], H = a.state.shape[1];
  const bool crowded = S * H >= kFitting * call.multiprocessors;
  Segments g{};
  if (call.batch_invariant || crowded || T < 2 * kSegment * S || !in_chunks(a)) return g;
  g.most = static_cast<int>(ceil_div(T + kChunk - 1, kSegment));
  g.states = reinterpret_cast<float*>(call.workspace);
  g.decays = g.states + all_segments(a) * H * a.state.shape[2] * a.state.shape[3];
  return g;
}

int64_t workspace_bytes(const SsmArgs& a, const CudaCall& call) {
  if (!make_segments(a, call).most) return 0;
  return all_segments(a) * a.state.shape[1] * (a.state.shape[2] * a.state.shape[3] + 1) * 4;
}

template <class State>
void launch_segments(const SsmArgs& a, const Segments& g, const CudaCall& call) {
  const unsigned H = static_cast<unsigned>(a.state.shape[1]);
  const unsigned S = static_cast<unsigned>(a.slots.shape[0]);
  const int64_t size = a.state.shape[2] * a.state.shape[3];
  launch(call, end_states, dim3(H, g.most - 1, S), kThreads, sizeof(ChunkShared), a, g);
  launch(call, begin_states<State>, dim3(static_cast<unsigned>(ceil_div(size, kThreads * 4)), H, S),
         kThreads, 0, a, g);
  launch(call, scan_segments<State>, dim3(H, g.most, S), kThreads, sizeof(ChunkShared), a, g);
}

// ---- token by token

constexpr int kRows = kThreads / kWarp * kSsmRows;

template <class T, class State, int kSteps>
__global__ void __launch_bounds__(kThreads) scan_tokens(const __grid_constant__ SsmArgs a) {
  const int head = blockIdx.y;
  const int64_t s = blockIdx.z;
  if (!scanned(a, s, head)) return;
  const int32_t* cu = a.cu_seqlens.ptr<int32_t>() + s;
  const int first = blockIdx.x * kRows + threadIdx.x / kWarp * kSsmRows;
  run_rows<T, State, kSteps>(a, s, cu[0], cu[1], head, first);
}

void launch_ssm_scan(const SsmArgs& a, const CudaCall& call) {
  require_grid("ssm_scan", "slots", a.slots);
  require_aligned("ssm_scan", "x", a.x);
  require_aligned("ssm_scan", "B", a.B);
  require_aligned("ssm_scan", "C", a.C);
  require_aligned("ssm_scan", "y", a.y);
  require_aligned("ssm_scan", "state", a.state);
  const unsigned H = static_cast<unsigned>(a.state.shape[1]);
  const unsigned S = static_cast<unsigned>(a.slots.shape[0]);
  const int64_t P = a.state.shape[2];
  if (const Segments g = make_segments(a, call); g.most)
    return a.stochastic() ? launch_segments<f16>(a, g, call) : launch_segments<float>(a, g, call);
  if (in_chunks(a))
    return launch(call, a.stochastic() ? scan_chunks<f16> : scan_chunks<float>, dim3(H, S),
                  kThreads, sizeof(ChunkShared), a);
  const dim3 grid(static_cast<unsigned>(P / kRows), H, S);
  by_kind(a, [&](auto x, auto state, auto steps) {
    launch(call, scan_tokens<decltype(x), decltype(state), steps()>, grid, kThreads, 0, a);
  });
}

const RegisterCuda<SsmArgs, launch_ssm_scan, workspace_bytes> registered("ssm_scan");

}  // namespace
}  // namespace ei::cuda
