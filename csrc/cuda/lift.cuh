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

// Shorter chains of dependent additions, within 64 registers.
template <class A>
constexpr int kLanes = sizeof(A) == 8 ? 2 : 4;

template <class A, int count>
__device__ inline A folded(const A (&lanes)[count]) {
  return count == 2 ? lanes[0] + lanes[1] : (lanes[0] + lanes[1]) + (lanes[count - 2] + lanes[count - 1]);
}

template <class N, class A, class T, int packs>
__device__ inline A sum(const Pack (&batch)[packs], double p) {
  constexpr int count = kLanes<A>;
  A lanes[count] = {};
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const auto x = bit_cast<Elements<T>>(batch[u]);
#pragma unroll
    for (int e = 0; e < kPerPack<T>; ++e) lanes[(u * kPerPack<T> + e) % count] += lift_one<N>(A(widen(x.of[e])), p);
  }
  return folded(lanes);
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

// The sum of a batch as it came out, or taken again.
template <class N, class T, class A, int packs>
__device__ inline double trusted(A sum, const Pack (&batch)[packs]) {
  if (sizeof(A) == 8 || N::kCounts || is_trusted(sum)) return sum;
  return all_zero<T>(batch) ? 0.0 : cuda::sum<N, double, T>(batch, 0);
}

template <class N, class T, int packs>
__device__ inline double trusted_sum(const Pack (&batch)[packs], double p) {
  if constexpr (N::kInDouble)
    return sum<N, double, T>(batch, p);
  else
    return trusted<N, T>(sum<N, Wide<T>, T>(batch, p), batch);
}

template <class T, int packs>
__device__ inline int count_nonfinite(const Pack (&batch)[packs]) {
  int count = 0;
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const auto x = bit_cast<Elements<T>>(batch[u]);
#pragma unroll
    for (int e = 0; e < kPerPack<T>; ++e) count += !(fabs(widen(x.of[e])) < Wide<T>(HUGE_VAL));
  }
  return count;
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

// Statistics on their way, of elements of T: what registers can hold beside a batch.
template <class T>
struct Counted {
  double squares = 0, magnitudes = 0;
  int zeros = 0, nonfinite = 0;
  Bits<T> largest = 0;

  __device__ Stats stats() const {
    return {squares, magnitudes, double(zeros), double(nonfinite), value_of<T>(largest)};
  }
};

// In one loop, or every element would be kept widened from one to the next.
template <class T, int packs>
__device__ inline void add(Counted<T>& counted, const Pack (&batch)[packs]) {
  using A = Wide<T>;
  constexpr int count = kLanes<A>;
  A squares[count] = {}, magnitudes[count] = {};
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const auto x = bit_cast<Elements<Bits<T>>>(batch[u]);
#pragma unroll
    for (int e = 0; e < kPerPack<T>; ++e) {
      const Bits<T> bits = x.of[e] & kMagnitude<T>;
      const A magnitude = widen(bit_cast<T>(bits));
      const int lane = (u * kPerPack<T> + e) % count;
      squares[lane] += lift_one<Two>(magnitude, 0);
      magnitudes[lane] += magnitude;
      counted.largest = bits > counted.largest ? bits : counted.largest;
      counted.zeros += bits == 0;
    }
  }
  counted.squares += trusted<Two, T>(folded(squares), batch);
  const double sum = trusted<One, T>(folded(magnitudes), batch);
  counted.magnitudes += sum;
  if (!(sum < HUGE_VAL)) counted.nonfinite += count_nonfinite<T>(batch);
}

template <class T>
__device__ inline void add(Counted<T>& counted, T element) {
  const Bits<T> bits = bit_cast<Bits<T>>(element) & kMagnitude<T>;
  const double magnitude = value_of<T>(bits);
  counted.squares += magnitude * magnitude;
  counted.magnitudes += magnitude;
  counted.largest = bits > counted.largest ? bits : counted.largest;
  counted.zeros += bits == 0;
  counted.nonfinite += !(magnitude < HUGE_VAL);
}

}  // namespace fusedclip::cuda
