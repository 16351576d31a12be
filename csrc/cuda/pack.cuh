// Packs: 16 bytes of elements, the widest that one instruction loads or stores.
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

// The aligned packs among so many bytes from here on.
struct Packs {
  Pack* begin;
  int64_t count;
};
__device__ inline Packs packs_of(char* data, int64_t bytes) {
  const int64_t heads = -reinterpret_cast<intptr_t>(data) & int64_t(sizeof(Pack) - 1);
  return {reinterpret_cast<Pack*>(data + heads), (bytes - heads) / int64_t(sizeof(Pack))};
}

// `count` elements as up to 7 single ones, aligned packs, and up to 7 single ones: views into a flat buffer begin
// anywhere.
template <class T>
struct Split {
  T* head;
  int heads;
  Pack* packs;
  int count;  // of a block's share: below 32 GB
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
  const int packs = int((count - heads) / kPerPack<T>);
  return {first,
          heads,
          reinterpret_cast<Pack*>(body),
          packs,
          body + int64_t(packs) * kPerPack<T>,
          int((count - heads) & (kPerPack<T> - 1))};
}

// The single element that the t-th thread takes care of, the heads before the tails, or null.
template <class T>
__device__ inline T* edge_of(const Split<T>& s, int t) {
  if (t < s.heads) return s.head + t;
  return t - s.heads < s.tails ? s.tail + (t - s.heads) : nullptr;
}

}  // namespace fusedclip::cuda
