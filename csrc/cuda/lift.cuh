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
template <Norm norm>
constexpr bool kZeroIsNeutral = norm != Norm::kPower && norm != Norm::kMin;

template <Norm norm, class A>
__device__ inline A lift_one(A x, double p) {
  if constexpr (norm == Norm::kZero) return A(x != 0);
  if constexpr (norm == Norm::kTwo) return x * x;
  if constexpr (norm == Norm::kPower) return A(exp2(p * log2(fabs(double(x)))));  // 0, inf and NaN come out as pow's
  return fabs(x);
}

template <Norm norm, class A, class T, int packs>
__device__ inline A sum(const Pack (&batch)[packs], double p) {
  constexpr int count = sizeof(A) == 8 ? 2 : 4;  // shorter chains of dependent additions, within 64 registers
  A lanes[count] = {};
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const auto x = bit_cast<Elements<T>>(batch[u]);
#pragma unroll
    for (int e = 0; e < kPerPack<T>; ++e) lanes[(u * kPerPack<T> + e) % count] += lift_one<norm>(A(widen(x.of[e])), p);
  }
  return count == 2 ? lanes[0] + lanes[1] : (lanes[0] + lanes[1]) + (lanes[count - 2] + lanes[count - 1]);
}

// Exact zeros are common in embedding gradients and must not pay for fp64, which is slow on consumer GPUs.
template <class T, int packs>
__device__ inline bool all_zero(const Pack (&batch)[packs]) {
  uint32_t bits = 0;
#pragma unroll
  for (int u = 0; u < packs; ++u) bits |= batch[u].x | batch[u].y | batch[u].z | batch[u].w;
  return (bits & (sizeof(T) == 2 ? 0x7fff7fffu : 0x7fffffffu)) == 0;
}

template <Norm norm, class T, int packs>
__device__ inline double trusted_sum(const Pack (&batch)[packs], double p) {
  if constexpr (norm == Norm::kPower || sizeof(T) == 8) return sum<norm, double, T>(batch, p);
  const float fast = sum<norm, float, T>(batch, p);
  if (norm == Norm::kZero || is_trusted(fast)) return fast;
  return all_zero<T>(batch) ? 0.0 : sum<norm, double, T>(batch, p);
}

template <Norm norm, class T, int packs>
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
  return extreme<T>(norm, most, least);
}

template <Norm norm, class T, int packs>
__device__ inline double lift(const Pack (&batch)[packs], double p) {
  if constexpr (norm == Norm::kMax || norm == Norm::kMin)
    return extreme<norm, T>(batch);
  else
    return trusted_sum<norm, T>(batch, p);
}

}  // namespace fusedclip::cuda
