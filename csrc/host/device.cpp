// device.h on CUDA; in a build without CUDA every function that needs it refuses.
#include "host/device.h"

#include <sstream>
#include <stdexcept>

#if defined(ELASTIC_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace ei::device {

#if defined(ELASTIC_CUDA)

namespace {

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("CUDA ") + what + ": " + cudaGetErrorString(error));
}
cudaStream_t of(Stream s) { return static_cast<cudaStream_t>(s); }
constexpr int kLeastMajor = 8;  // sm_80: bfloat16 products and asynchronous copies

}  // namespace

bool built() { return true; }
std::string missing() { return ""; }

std::vector<std::string> architectures() {
  std::istringstream list(ELASTIC_CUDA);
  std::vector<std::string> found;
  for (std::string one; std::getline(list, one, ',');) found.push_back(one);
  return found;
}

std::string unusable(int index) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("the driver gives none (") + cudaGetErrorString(error) + ")";
  }
  if (index >= count) return "there are " + std::to_string(count);
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (major < kLeastMajor)
    return "it is of compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           ", 8.0 is the least";
  // Whether any kernel image in this module fits: every one is built for the same architectures.
  const Use use(index);
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe_kernel());
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("this build has no kernels for compute capability ") +
           std::to_string(major) + "." + std::to_string(minor) + " (" + cudaGetErrorString(error) +
           ")";
  }
  return "";
}

CudaCall call_on(int index) {
  CudaCall call;
  must(cudaDeviceGetAttribute(&call.multiprocessors, cudaDevAttrMultiProcessorCount, index),
       "device");
  int major = 0, minor = 0;
  must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device");
  must(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device");
  call.compute_capability = major * 10 + minor;
  return call;
}

bool overlaps(int index) {
  const Use use(index);
  cudaFuncAttributes attributes;
  must(cudaFuncGetAttributes(&attributes, probe_kernel()), "device");
  return attributes.ptxVersion >= 90;  // what __CUDA_ARCH__ / 10 was
}

Use::Use(int index) : before_(-1) {
  int now = 0;
  must(cudaGetDevice(&now), "device");
  if (now == index) return;
  must(cudaSetDevice(index), "device");
  before_ = now;
}
Use::~Use() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void Free::operator()(char* p) const { cudaFree(p); }

Memory allocate(int64_t bytes) {
  void* p = nullptr;
  must(cudaMalloc(&p, bytes), "workspace");
  return Memory(static_cast<char*>(p));
}

void poison(char*, int64_t) {}

bool recording(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  must(cudaStreamIsCapturing(of(stream), &status), "stream");
  return status != cudaStreamCaptureStatusNone;
}

void order(Stream before, Stream after) {
  cudaEvent_t event = nullptr;
  must(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  cudaError_t error = cudaEventRecord(event, of(before));
  if (error == cudaSuccess) error = cudaStreamWaitEvent(of(after), event, 0);
  cudaEventDestroy(event);  // once it has been reached
  must(error, "order of streams");
}

struct Graph::Recorded {
  cudaStream_t stream = nullptr;
  cudaGraphExec_t exec = nullptr;
  bool open = false;

  ~Recorded() {
    cudaGraph_t unfinished = nullptr;
    if (open) cudaStreamEndCapture(stream, &unfinished);
    if (unfinished) cudaGraphDestroy(unfinished);
    if (exec) cudaGraphExecDestroy(exec);
    if (stream) cudaStreamDestroy(stream);
  }
};

Graph::Graph() : recorded_(std::make_unique<Recorded>()) {}
Graph::~Graph() = default;

Stream Graph::begin() {
  Recorded& r = *recorded_;
  must(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking), "stream");
  // Other threads may allocate meanwhile.
  must(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal), "graph capture");
  r.open = true;
  return r.stream;
}

void Graph::end() {
  Recorded& r = *recorded_;
  cudaGraph_t graph = nullptr;
  r.open = false;
  must(cudaStreamEndCapture(r.stream, &graph), "graph capture");
  const cudaError_t error = cudaGraphInstantiate(&r.exec, graph, 0);
  cudaGraphDestroy(graph);
  must(error, "graph instantiation");
}

void Graph::run(Stream stream) { must(cudaGraphLaunch(recorded_->exec, of(stream)), "graph"); }

struct Clock::Marks {
  std::vector<cudaEvent_t> events;
  size_t next = 0;

  ~Marks() {
    for (cudaEvent_t e : events) cudaEventDestroy(e);
  }
};

Clock::Clock(int marks) : marks_(std::make_unique<Marks>()) {
  marks_->events.resize(marks);
  for (cudaEvent_t& e : marks_->events) must(cudaEventCreate(&e), "event");
}
Clock::~Clock() = default;

void Clock::mark(Stream stream) {
  must(cudaEventRecord(marks_->events.at(marks_->next++), of(stream)), "event");
}

std::vector<double> Clock::seconds() {
  const auto& e = marks_->events;
  std::vector<double> times;
  must(cudaEventSynchronize(e.at(marks_->next - 1)), "kernel");
  for (size_t i = 1; i < marks_->next; ++i) {
    float ms = 0.0f;
    must(cudaEventElapsedTime(&ms, e[i - 1], e[i]), "event");
    times.push_back(ms * 1e-3);
  }
  return times;
}

#else

namespace {
[[noreturn]] void refuse() { throw std::logic_error("this build has no CUDA kernels"); }
}  // namespace

bool built() { return false; }
std::string missing() { return ELASTIC_CUDA_MISSING; }
std::vector<std::string> architectures() { return {}; }
std::string unusable(int) { return "this build has no CUDA kernels"; }
CudaCall call_on(int) { refuse(); }
bool overlaps(int) { refuse(); }
Use::Use(int) { refuse(); }
Use::~Use() = default;
void Free::operator()(char*) const {}
Memory allocate(int64_t) { refuse(); }
void poison(char*, int64_t) {}
bool recording(Stream) { refuse(); }
void order(Stream, Stream) { refuse(); }
struct Graph::Recorded {};
Graph::Graph() { refuse(); }
Graph::~Graph() = default;
Stream Graph::begin() { refuse(); }
void Graph::end() {}
void Graph::run(Stream) {}
struct Clock::Marks {};
Clock::Clock(int) { refuse(); }
Clock::~Clock() = default;
void Clock::mark(Stream) {}
std::vector<double> Clock::seconds() { return {}; }

#endif

}  // namespace ei::device
