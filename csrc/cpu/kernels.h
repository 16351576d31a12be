// What the CPU engine asks of one instruction set. kernels.cpp is compiled once per set; kernels() picks at run time.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../norm_ops.h"

namespace fusedclip::cpu {

struct UpdateKernels;

struct Kernels {
  const char* name;
  // The lifted value of `count` elements, in fp64; `norm` is that of `p`.
  double (*lift)(DType dtype, Norm norm, double p, const void* data, int64_t count);
  // The same sum of squares, and the rest that one read tells.
  Stats (*stats)(DType dtype, const void* data, int64_t count);
  // data *= coef, in float for 16-bit dtypes, in double for the others.
  void (*scale)(DType dtype, double coef, void* data, int64_t count);
  // data = min(max(data, -bound), bound), NaN kept. Stores only where something changes; tells whether it did.
  bool (*clamp)(DType dtype, double bound, void* data, int64_t count);
  const UpdateKernels* updates;
};

// The set in use: the best one, unless use_kernels() chose another.
const Kernels& kernels();
void use_kernels(const Kernels& set);

// Every set that this build holds and this processor can run, best first: tests hold them against each other.
int kernel_sets(const Kernels** out, int capacity);

}  // namespace fusedclip::cpu
