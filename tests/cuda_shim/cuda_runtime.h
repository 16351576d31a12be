// The CUDA words that csrc/cuda uses, for a host compiler. As many blocks run at once as a small GPU would hold; each
// CUDA thread is a std::thread (threads.h), so that the sanitizers see what a GPU's threads would do to each other, or
// with FUSEDCLIP_SHIM_FIBERS a fiber (fibers.h), which costs a tenth.
#pragma once

#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(uint32_t n) : x(n) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

struct Barrier;
struct Block;
inline thread_local Block* block;
inline thread_local Barrier* grid;
inline thread_local int barriers_met;

}  // namespace shim

#ifdef FUSEDCLIP_SHIM_FIBERS
#include "fibers.h"
#else
#include "threads.h"
#endif

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotPermitted = 800,
  cudaErrorNotSupported = 801
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace shim {

constexpr int kMultiprocessors = 2, kResidentBlocks = 4, kThreads = 64;
constexpr int kSharedBytes = 128 + 12 * (1024 + 16);  // twelve tiles of 64 threads, beside the kernels' own

constexpr int kGridBarrier = -1;

// What a test asks of the machine.
struct Machine {
  bool launches_run = std::getenv("FUSEDCLIP_SHIM_NO_LAUNCHES") == nullptr;  // without: what the host alone takes
  cudaError_t status = cudaSuccess;                                          // what the call named below answers
  const char* failing_call = "";
  int driver = 12040;       // the CUDA that it knows
  int dropped_barrier = 0;  // the number of a __syncthreads that no thread waits at, or kGridBarrier; 0: none
  std::atomic<int> launches = 0, cooperative_launches = 0;
};
inline Machine machine;

inline cudaError_t answer(const char* call) {
  return std::strcmp(call, machine.failing_call) == 0 ? machine.status : cudaSuccess;
}

struct Warp {
  double values[32];
  Barrier barrier{32};
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> objects;  // exactly as large as asked for: the sanitizers guard its ends
  std::unique_ptr<uint4[]> dynamic;

  Block(uint32_t threads, size_t object_bytes, size_t dynamic_bytes)
      : barrier(threads),
        warps(threads / 32),
        objects(new unsigned char[object_bytes]),
        dynamic(new uint4[dynamic_bytes / sizeof(uint4)]) {
    std::memset(objects.get(), 0xff, object_bytes);  // NaN, for whoever reads before anybody wrote
    std::memset(static_cast<void*>(dynamic.get()), 0xff, dynamic_bytes);
  }
};

// Places are given before main(), without a lock that would order the threads and hide their races.
inline size_t object_bytes = 0;
template <class T>
inline const size_t place_of = (object_bytes += sizeof(T)) - sizeof(T);

inline Warp& warp() { return block->warps[threadIdx.x / 32]; }

// All resident blocks at once, wave after wave.
class Multiprocessors {
 public:
  void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    assert(config.blockDim.x == kThreads);
    Barrier all(config.gridDim.x * kThreads);
    for (uint32_t first = 0; first < config.gridDim.x; first += kResidentBlocks) {
      for (auto& resident : resident_)
        resident = std::make_unique<Block>(kThreads, object_bytes, config.dynamicSmemBytes);
      workers_.run([&](uint32_t t) {
        const uint32_t b = first + t / kThreads;
        if (b >= config.gridDim.x) return;
        threadIdx.x = t % kThreads, blockIdx.x = b, blockDim = config.blockDim, gridDim = config.gridDim;
        block = resident_[t / kThreads].get(), grid = &all, barriers_met = 0;
        kernel();
      });
    }
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<Block> resident_[kResidentBlocks];
  Workers workers_{kResidentBlocks * kThreads};
};

inline Multiprocessors& multiprocessors() {
  static Multiprocessors all;
  return all;
}

}  // namespace shim

inline void __syncthreads() {
  if (++shim::barriers_met != shim::machine.dropped_barrier) shim::block->barrier.arrive_and_wait();
}

inline double __shfl_xor_sync(unsigned, double value, int distance) {
  shim::Warp& warp = shim::warp();
  const uint32_t lane = threadIdx.x % 32;
  warp.values[lane] = value;
  warp.barrier.arrive_and_wait();
  const double other = warp.values[lane ^ uint32_t(distance)];
  warp.barrier.arrive_and_wait();
  return other;
}

namespace fusedclip::cuda {

template <class T>
T& block_shared() {
  return *reinterpret_cast<T*>(shim::block->objects.get() + shim::place_of<T>);
}
inline uint4* dynamic_shared() { return shim::block->dynamic.get(); }

}  // namespace fusedclip::cuda

// --- the host's side ---
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version"
         : status == cudaErrorNoDevice         ? "no CUDA-capable device is detected"
                                               : "unspecified launch failure";
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, shim::answer("cudaGetDevice"); }
inline cudaError_t cudaSetDevice(int) { return shim::answer("cudaSetDevice"); }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, shim::answer("cudaGetDeviceCount"); }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = shim::machine.driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {shim::kMultiprocessors, 1, shim::kSharedBytes};
  return *value = values[which], shim::answer("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return *attributes = {128, 90}, shim::answer("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return shim::answer("cudaFuncSetAttribute");
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, shim::answer("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool cooperative = config->numAttrs && config->attrs->id == cudaLaunchAttributeCooperative;
  if (const cudaError_t status = shim::answer(cooperative ? "cooperative launch" : "cudaLaunchKernelEx")) return status;
  ++shim::machine.launches;
  shim::machine.cooperative_launches += cooperative;
  if (!shim::machine.launches_run) return cudaSuccess;
  const std::tuple<Parameters...> parameters(arguments...);
  shim::multiprocessors().run(*config, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}
