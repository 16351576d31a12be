#include "device.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "engine.h"

namespace fusedclip::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

cudaFuncAttributes attributes_of(const void* kernel) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes;
}

// Tiles that a block of every such kernel can have in shared memory, after raising the kernels' limits to that.
int shared_tiles(const std::vector<const void*>& kernels, int64_t tile, int most_bytes) {
  int64_t tiles = most_bytes / tile;
  for (const void* kernel : kernels)
    tiles = std::min(tiles, (most_bytes - int64_t(attributes_of(kernel).sharedSizeBytes)) / tile);
  for (const void* kernel : kernels)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(tiles * tile)),
          "cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize)");
  return int(tiles);
}

// All blocks of a cooperative launch must be resident at once: one of each such kernel has to fit an SM.
bool one_fits(const std::vector<const void*>& kernels, int threads, int64_t shared_bytes) {
  for (const void* kernel : kernels) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    if (blocks == 0) return false;
  }
  return true;
}

// While one lives, what this thread asks of the driver is allowed although a graph is being recorded.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Device ask(int device, const Kernels& kernels) {
  const RelaxedCapture relaxed;
  // Not the device's architecture: what came as PTX has the bounds of the one that it was compiled for.
  int architecture = 0;
  for (const auto& some : {kernels.on_chip, kernels.streaming})
    for (const void* kernel : some) architecture = attributes_of(kernel).ptxVersion;  // which loads it
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  Device found{};
  found.policy = policy_of(architecture);
  found.max_blocks = sms * found.policy.blocks_per_sm;
  found.programmatic = architecture >= 90;
  if (!attribute(cudaDevAttrCooperativeLaunch, device)) return found;
  const int64_t tile = on_chip_tile_bytes(found.policy);
  const int tiles = shared_tiles(kernels.on_chip, tile, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (!one_fits(kernels.on_chip, found.policy.threads, tiles * tile)) return found;
  found.on_chip_blocks = sms;
  found.on_chip_tiles = tiles;
  return found;
}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Before R530 kernel parameters end at 4 KB (table.h). Such a driver runs what else CUDA 12 has built.
constexpr int kOldestDriver = 12010;

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // whoever asks next is not to be told again
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

const Device& made_ready(int device, const Kernels& kernels) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) check(cudaSetDevice(device), "cudaSetDevice");
  static std::mutex mutex;
  static std::map<std::pair<int, const Kernels*>, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair key(device, &kernels);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, ask(device, kernels)).first->second;
}

std::string missing() {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
  const std::string known = "the driver knows CUDA " + version_name(driver);
  if (status == cudaSuccess) {
    if (count == 0) return "cudaGetDeviceCount: there are 0 devices";
    return driver < kOldestDriver ? known + ", and " + version_name(kOldestDriver) + " (R530) is needed" : "";
  }
  cudaGetLastError();
  std::string reason = std::string("cudaGetDeviceCount: ") + cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver)  // which leaves out the versions
    reason += driver == 0 ? " (no NVIDIA driver is installed)"
                          : " (" + known + ", this was built with " + version_name(runtime) + ")";
  return reason;
}

}  // namespace fusedclip::cuda
