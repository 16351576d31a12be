// The CUDA half, as the bindings see it: no CUDA header needed to include this.
#pragma once

#include "../tiling.h"

namespace fusedclip::cuda {

// How many devices the driver offers. Throws std::runtime_error with CUDA's own words if there is no usable driver.
int device_count();

// partials[b] = the sum of squares that block b read, for b in [0, blocks), on the device of `segment`. Asynchronous.
void square_sum(const Segment& segment, double* partials, int blocks, void* stream);

}  // namespace fusedclip::cuda
