#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "engine.h"
#include "kernels.cuh"

namespace fusedclip::cuda {
namespace {

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

template <class T>
void launch(const Segment& s, double* partials, int blocks, cudaStream_t stream) {
  square_sum_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(s.data), s.count, partials);
  check(cudaGetLastError(), "square_sum_kernel");
}

}  // namespace

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

void square_sum(const Segment& segment, double* partials, int blocks, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (segment.dtype) {
    case DType::kFloat32: return launch<float>(segment, partials, blocks, s);
    case DType::kFloat64: return launch<double>(segment, partials, blocks, s);
    case DType::kBFloat16: return launch<BFloat16>(segment, partials, blocks, s);
    case DType::kFloat16: return launch<Float16>(segment, partials, blocks, s);
  }
}

}  // namespace fusedclip::cuda
