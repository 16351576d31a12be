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
  bool programmatic;                  // a launch may begin while the one before it ends (Start::kEarly)
  int on_chip_blocks, on_chip_tiles;  // of the cooperative form: its blocks, and the tiles that each can keep; or 0
};

// Those that one kind of call launches: the streaming ones, and those that keep gradients on chip.
struct Kernels {
  std::vector<const void*> streaming, on_chip;
};

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// Makes it current, as it is for torch, which sets a device as late as it can. Torch's own guard, in backends/cuda.py,
// is the one that restores: it makes no context (0.5 GB) on a device that the process never used.
//
// What a device can do is asked of the driver once per set of kernels, which are loaded then: one that is loaded at its
// first launch may wait for the device, or end the recording of a graph.
const Device& made_ready(int device, const Kernels& kernels);

}  // namespace fusedclip::cuda
