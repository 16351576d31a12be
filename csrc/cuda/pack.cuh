// Packs: 16 bytes of elements, the widest that one instruction loads or stores, and how elements become numbers.
#pragma once

#include <cuda_runtime.h>

#include "../dtypes.h"
#include "launch_policy.h"

namespace fusedclip::cuda {

#ifdef __CUDA_ARCH__
constexpr LaunchPolicy kPolicy = policy_of(__CUDA_ARCH__ / 10);
#else
constexpr LaunchPolicy kPolicy = policy_of(0);
#endif
constexpr int kThreads = kPolicy.threads, kUnroll = kPolicy.unroll, kWriteUnroll = kPolicy.write_unroll;
constexpr int64_t kTileBytes = tile_bytes(kPolicy);

using Pack = uint4;
template <class T>
constexpr int kPerPack = sizeof(Pack) / sizeof(T);

template <class T>
struct Elements {
  T of[kPerPack<T>];
};

// The type that arithmetic on T is done in.
template <class T>
using Arithmetic = decltype(widen(T{}));

// One conversion instruction where dtypes.h needs ten for float16: reading would no longer be bound by memory.
template <class T>
__device__ inline Arithmetic<T> to_arithmetic(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Float16>) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
  }
#endif
  return widen(x);
}

// Rounds to nearest even.
template <class T>
__device__ inline T from_arithmetic(Arithmetic<T> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else {
#ifdef __CUDA_ARCH__
    T narrow;
    if constexpr (std::is_same_v<T, Float16>)
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
    return narrow;
#else
    if constexpr (std::is_same_v<T, Float16>)
      return to_float16(x);
    else
      return to_bfloat16(x);
#endif
  }
}

template <class F>
__device__ inline auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    default: return f(float{});
  }
}

// `count` elements as up to 7 single ones, aligned packs, and up to 7 single ones: views into a flat buffer begin
// anywhere.
template <class T>
struct Split {
  T* head;
  int heads;
  Pack* packs;
  int64_t count;
  T* tail;
  int tails;
};

template <class T>
__device__ inline Split<T> split(char* data, int64_t count) {
  const int misaligned = int(reinterpret_cast<uintptr_t>(data) % sizeof(Pack) / sizeof(T));
  int heads = misaligned == 0 ? 0 : kPerPack<T> - misaligned;
  if (heads > count) heads = int(count);
  T* const first = reinterpret_cast<T*>(data);
  T* const body = first + heads;
  const int64_t packs = (count - heads) / kPerPack<T>;
  return {first,
          heads,
          reinterpret_cast<Pack*>(body),
          packs,
          body + packs * kPerPack<T>,
          int(count - heads - packs * kPerPack<T>)};
}

// The single element that this thread takes care of, the heads before the tails, or null.
template <class T>
__device__ inline T* edge_of(const Split<T>& s) {
  const int t = int(threadIdx.x);
  if (t < s.heads) return s.head + t;
  return t - s.heads < s.tails ? s.tail + (t - s.heads) : nullptr;
}

}  // namespace fusedclip::cuda
