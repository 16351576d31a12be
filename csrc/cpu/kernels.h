// What the CPU engine asks of one instruction set. kernels.cpp is compiled once per set; kernels() picks at run time.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtypes.h"
#include "../norm_ops.h"

namespace fusedclip::cpu {

// How a tile is gone through. Hardware prefetchers follow a stream of addresses to the end of its page: several streams
// keep more reads in flight, and asking for memory `ahead` of them has the next page looked up before it is needed.
// Which pattern is fastest belongs to the processor (patterns.cpp); none changes a bit of any result.
struct Pattern {
  int streams = 1;      // 1, 2 or 4 parts of the tile turn about
  int ahead = 0;        // bytes
  bool by_page = true;  // asks for a line of each page there; else for every line
};

struct UpdateKernels;

struct Kernels {
  const char* name;
  // The lifted value of `count` elements, in fp64; `norm` is that of `p`.
  double (*lift)(DType dtype, Norm norm, double p, const void* data, int64_t count, Pattern pattern);
  // The same sum of squares, and the rest that one read tells.
  Stats (*stats)(DType dtype, const void* data, int64_t count, Pattern pattern);
  // data *= coef, in float for 16-bit dtypes, in double for the others.
  void (*scale)(DType dtype, double coef, void* data, int64_t count, Pattern pattern);
  // data = min(max(data, -bound), bound), NaN kept. Stores only where something changes; tells whether it did.
  bool (*clamp)(DType dtype, double bound, void* data, int64_t count, Pattern pattern);
  const UpdateKernels* updates;
};

// The set in use: the best one, unless use_kernels() chose another.
const Kernels& kernels();
void use_kernels(const Kernels& set);

// Every set that this build holds and this processor can run, best first: tests hold them against each other.
std::vector<const Kernels*> kernel_sets();

}  // namespace fusedclip::cpu
