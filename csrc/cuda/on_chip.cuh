// A block's share of tiles kept in shared memory. Each thread fetches, reads and rewrites its own packs, so that no
// thread waits for another. The single elements at misaligned ends are read twice instead.
#pragma once

#include "walk.cuh"

namespace fusedclip::cuda {

// Where a tile comes from and goes back to: `packs` of them from here on, one per thread from the first.
struct Origin {
  Pack* begin;
  int packs;
  DType dtype;
};
static_assert(on_chip_tile_bytes(kPolicy) == kTileBytes + sizeof(Origin), "what the launch asks for");

// The tiles of a share, and a directory of them. What knows segments and dtypes is done once, here, so that the loops
// over tiles are short enough to be fetched by a cold instruction cache at no cost that counts.
class Kept {
 public:
  template <class Table>
  __device__ Kept(const Table& table, const Share& share)
      : tiles_(int(share.end - share.begin)),
        own_(dynamic_shared() + threadIdx.x),
        origins_(reinterpret_cast<Origin*>(dynamic_shared() + int64_t(tiles_) * kThreads)) {
    for (int s = share.first; s <= share.last; ++s) list(table, share, s);
    __syncthreads();
  }

  __device__ int tiles() const { return tiles_; }
  __device__ const Origin& origin(int k) const { return origins_[k]; }
  __device__ bool has(int k) const { return int(threadIdx.x) < origins_[k].packs; }
  __device__ Pack* home(int k) const {
    Pack* const home = origins_[k].begin + threadIdx.x;
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(home));  // an address out of shared memory could be of any kind
#endif
    return home;
  }
  __device__ Pack& own(int k) const { return own_[int64_t(k) * kThreads]; }  // this thread's pack

  // Begins to fetch it, without a register to hold it meanwhile. Every tile counts, those behind the last one too.
  __device__ void fetch(int k) const {
    if (k < tiles_ && has(k)) start_copy(&own(k), home(k));
    end_of_copies();
  }

 private:
  template <class Table>
  __device__ void list(const Table& table, const Share& share, int s) {
    const Stretch stretch = stretch_of(table, share, s, kTileBytes);
    const Tiles tiles = tiles_of(table, share, s);
    const int begin = int(tiles.begin - share.begin), end = int(tiles.end - share.begin);
    const auto parts = packs_of(stretch.data, stretch.count * size_of(stretch.dtype));
#pragma unroll 1
    for (int k = begin + int(threadIdx.x); k < end; k += kThreads) {
      const int64_t before = int64_t(k - begin) * kThreads, left = parts.count - before;
      origins_[k] = {parts.begin + before, int(left < kThreads ? left : kThreads), stretch.dtype};
    }
  }

  // From global to shared memory, past the first-level cache; waited for by groups.
  __device__ static void start_copy(Pack* to, const Pack* from) {
#ifdef __CUDA_ARCH__
    const auto address = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
    *to = *from;
#endif
  }
  __device__ static void end_of_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  int tiles_;
  Pack* own_;
  Origin* origins_;
};

// Waits until this thread's copies have arrived, but for those of the last `pending` tiles that it began to fetch.
template <int pending>
__device__ inline void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Tiles on their way while one is read: 64 KB for an SM, as much as the streaming kernels have.
constexpr int kAhead = 8;

// The lifted value of this thread's packs, which from then on are on chip.
template <class N>
__device__ inline double read(const Kept& kept) {
  double lifted = identity(N::kCombining);
#pragma unroll 1
  for (int k = 0; k < kAhead; ++k) kept.fetch(k);
#pragma unroll 1
  for (int k = 0; k < kept.tiles(); ++k) {
    wait_for_copies<kAhead - 1>();
    if (kept.has(k)) {
      const Pack one[] = {kept.own(k)};
      const double value = with_dtype(kept.origin(k).dtype, [&](auto t) { return lift<N, decltype(t)>(one, 0.0); });
      lifted = combine(N::kCombining, lifted, value);
    }
    kept.fetch(k + kAhead);
  }
  return lifted;
}

template <class F>
__device__ inline void write_home(const Kept& kept, const F& f) {
#pragma unroll 1
  for (int k = kept.tiles() - 1; k >= 0; --k)
    if (kept.has(k))
      *kept.home(k) = with_dtype(kept.origin(k).dtype, [&](auto t) { return rewritten<decltype(t)>(kept.own(k), f); });
}

}  // namespace fusedclip::cuda
