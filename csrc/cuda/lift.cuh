// |x|^p of the packs that a thread holds, summed (or the largest, or the least) and given as fp64.
//
// A float sum takes in one unrolled batch before it goes to fp64. The most are 32 elements of 16 bits in four lanes: 7
// roundings in each and 2 where they are added leave 9 * 2^-24 = 5.4e-7 of the sum, whatever stands beside what. If the
// sum overflowed, or its squares vanished, it is taken again in fp64 from the registers that still hold the batch.
#pragma once

#include <cmath>

#include "../norm_ops.h"
#include "pack.cuh"

namespace fusedclip::cuda {

// Padding a batch with zeros changes nothing.
template <class N>
constexpr bool kZeroIsNeutral = !N::kInDouble && N::kCombining != Combining::kMin;

// For the functors of norms.h.
struct Math {
  template <class A>
  __device__ static A abs(A x) {
    return fabs(x);
  }
  // 0, inf and NaN come out as pow's.
  __device__ static double pow(double magnitude, double p) { return exp2(p * log2(magnitude)); }
};

template <class N, class A>
__device__ inline A lift_one(A x, double p) {
  if constexpr (N::kInDouble)
    return N::template lift<Math>(x, p);
  else
    return N::template lift<Math>(x);
}

template <class N, class A, class T, int packs>
__device__ inline A sum(const Pack (&batch)[packs], double p) {
  constexpr int count = sizeof(A) == 8 ? 2 : 4;  // shorter chains of dependent additions, within 64 registers
  A lanes[count] = {};
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const auto x = bit_cast<Elements<T>>(batch[u]);
#pragma unroll
    for (int e = 0; e < kPerPack<T>; ++e) lanes[(u * kPerPack<T> + e) % count] += lift_one<N>(A(widen(x.of[e])), p);
  }
  return count == 2 ? lanes[0] + lanes[1] : (lanes[0] + lanes[1]) + (lanes[count - 2] + lanes[count - 1]);
}

// Exact zeros are common in embedding gradients and must not pay for fp64, which is slow on consumer GPUs.
template <class T, int packs>
__device__ inline bool all_zero(const Pack (&batch)[packs]) {
  uint32_t bits = 0;
#pragma unroll
  for (int u = 0; u < packs; ++u) bits |= batch[u].x | batch[u].y | batch[u].z | batch[u].w;
  constexpr uint32_t ones = ~0u / std::make_unsigned_t<Bits<T>>(~Bits<T>{0});  // 1 in each element's place of a word
  return (bits & ones * kMagnitude<T>) == 0;
}

template <class N, class T, int packs>
__device__ inline double trusted_sum(const Pack (&batch)[packs], double p) {
  if constexpr (N::kInDouble || std::is_same_v<Wide<T>, double>) {
    return sum<N, double, T>(batch, p);
  } else {
    const float fast = sum<N, float, T>(batch, p);
    if (N::kCounts || is_trusted(fast)) return fast;
    return all_zero<T>(batch) ? 0.0 : sum<N, double, T>(batch, p);
  }
}

template <class N, class T, int packs>
__device__ inline double extreme(const Pack (&batch)[packs]) {
  Bits<T> most = 0, least = kMagnitude<T>;
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const auto x = bit_cast<Elements<Bits<T>>>(batch[u]);
#pragma unroll
    for (int e = 0; e < kPerPack<T>; ++e) {
      const Bits<T> magnitude = x.of[e] & kMagnitude<T>;
      most = magnitude > most ? magnitude : most;
      least = magnitude < least ? magnitude : least;
    }
  }
  return extreme<T>(N::kCombining, most, least);
}

template <class N, class T, int packs>
__device__ inline double lift(const Pack (&batch)[packs], double p) {
  if constexpr (N::kCombining == Combining::kSum)
    return trusted_sum<N, T>(batch, p);
  else
    return extreme<N, T>(batch);
}

}  // namespace fusedclip::cuda
