// The first CUDA kernel: the read pass of the 2-norm over one segment, one fp64 partial per block.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace fusedclip::cuda {

constexpr int kThreads = 256;

template <class T>
__global__ void square_sum_kernel(const T* __restrict__ x, int64_t count, double* __restrict__ partials) {
  double sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const double v = widen(x[i]);
    sum += v * v;
  }
  __shared__ double lanes[kThreads];
  lanes[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = lanes[0];
}

}  // namespace fusedclip::cuda
