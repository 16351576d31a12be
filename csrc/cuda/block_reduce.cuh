// From one value per thread to one per warp and per block, in an order that depends on nothing but the thread's number.
#pragma once

#include "../norm_ops.h"
#include "pack.cuh"

namespace fusedclip::cuda {

constexpr int kWarps = kThreads / kWarp;
static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "whole warps, and no more than one warp can combine");

#ifdef __CUDACC__
// An object that the threads of a block share.
template <class T>
__device__ inline T& block_shared() {
  __shared__ T object;
  return object;
}
// What the launch asked for.
__device__ inline Pack* dynamic_shared() {
  extern __shared__ Pack memory[];
  return memory;
}
#else  // the host shim of the tests gives each block its own
template <class T>
T& block_shared();
Pack* dynamic_shared();
#endif

// Threads that go through a stretch of memory together: those of a block, or of a warp.
template <int threads>
struct Team {
  static constexpr int size = threads;  // known when compiling: addresses then are one base and constants
  static constexpr bool only = threads == kThreads;
  int thread = only ? int(threadIdx.x) : int(threadIdx.x) % threads;
  int number = only ? 0 : int(threadIdx.x) / threads;
};
using Block = Team<kThreads>;
using Warp = Team<kWarp>;

// Every lane gets the result, and the same bits: at each step both partners combine the same two values.
__device__ inline double warp_reduce(Combining how, double value) {
#pragma unroll 1  // a shuffle of doubles is twenty instructions
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(how, value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

struct WarpValues {
  double of[kWarps];
};

// The first warp gets the result: no other has to repeat its arithmetic, which where fp64 is slow takes microseconds.
__device__ inline double block_reduce(Combining how, double value) {
  WarpValues& warps = block_shared<WarpValues>();
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  value = warp_reduce(how, value);
  __syncthreads();  // the values of the last call have been read
  if (lane == 0) warps.of[warp] = value;
  __syncthreads();
  return warp == 0 ? warp_reduce(how, lane < kWarps ? warps.of[lane] : identity(how)) : identity(how);
}

// The team's first thread gets the result.
template <class Team>
__device__ inline double team_reduce(Team, Combining how, double value) {
  if constexpr (Team::size == kWarp)
    return warp_reduce(how, value);
  else
    return block_reduce(how, value);
}

}  // namespace fusedclip::cuda
