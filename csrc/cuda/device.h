// A device as the launches see it, and CUDA's calls with their status checked.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "launch_policy.h"

namespace fusedclip::cuda {

// Throws std::runtime_error with the call and CUDA's reason.
void check(cudaError_t status, const char* call);

struct Device {
  LaunchPolicy policy;
  int max_blocks;                     // of the streaming kernels: all resident at once
  bool programmatic;                  // the second launch may begin while the first one ends
  int on_chip_blocks, on_chip_tiles;  // of the cooperative form: its blocks, and the tiles that each can keep; or 0
};

// What a device is asked about: any of the streaming kernels, and all that keep gradients on chip.
struct Kernels {
  const void* streaming;
  std::vector<const void*> on_chip;
};

// Asked of the driver once per device, and kernels made ready for it. `device` must be the current one.
const Device& properties_of(int device, const Kernels& kernels);

// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0, wanted_;
};

}  // namespace fusedclip::cuda
