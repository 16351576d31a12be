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

// Both sums of a batch. In one loop, or every element would be kept widened from one to the next.
template <class A>
struct Sums {
  A squares, magnitudes;
};
template <class A, class T, int packs, class See>
__device__ inline Sums<A> sums(const Pack (&batch)[packs], See see) {
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
      see(bits, magnitude);
    }
  }
  return {folded(squares), folded(magnitudes)};
}

template <class T, int packs>
__device__ inline void add(Counted<T>& counted, const Pack (&batch)[packs]) {
  const auto fast = sums<Wide<T>, T>(batch, [&](Bits<T> bits, Wide<T>) {
    counted.largest = bits > counted.largest ? bits : counted.largest;
    counted.zeros += bits == 0;
  });
  const bool is_double = sizeof(Wide<T>) == 8, trusted = is_trusted(fast.squares) && is_trusted(fast.magnitudes);
  if (is_double ? fast.magnitudes < HUGE_VAL : trusted || all_zero<T>(batch)) {
    counted.squares += fast.squares;
    counted.magnitudes += fast.magnitudes;
    return;
  }
#pragma unroll 1  // seldom gone through: short code counts
  for (int u = 0; u < packs; ++u) {
    Pack one[] = {batch[0]};
#pragma unroll
    for (int v = 1; v < packs; ++v)
      if (u == v) one[0] = batch[v];  // registers have no index
    const auto exact = sums<double, T>(one, [&](Bits<T>, double x) { counted.nonfinite += !(x < HUGE_VAL); });
    counted.squares += exact.squares;
    counted.magnitudes += exact.magnitudes;
  }
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
