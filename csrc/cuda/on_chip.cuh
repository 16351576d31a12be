// A block's share of tiles kept on chip: some in registers, the others in shared memory, each thread its own packs, so
// that no thread waits for another. The single elements at misaligned ends are read twice instead.
#pragma once

#include "walk.cuh"

namespace fusedclip::cuda {

constexpr int kInRegisters = kPolicy.on_chip_packs;

// This thread's pack of one tile, if the segment has one there.
struct Place {
  bool taken;
  Pack* pack;
  DType dtype;
};

// Goes through the share tile by tile. Walking it again gives the same places, which therefore need not be kept.
template <class Table>
class Cursor {
 public:
  __device__ Cursor(const Table& table, const Share& share) : table_(table), share_(share), tile_(share.begin) {
    enter(share.first);
  }

  __device__ Place next() {
    while (tile_ >= end_ && segment_ < share_.last) enter(segment_ + 1);
    const int64_t i = int64_t(tile_++ - begin_) * kThreads + threadIdx.x;
    return {i < count_, packs_ + i, dtype_};
  }

 private:
  __device__ void enter(int segment) {
    const Stretch stretch = stretch_of(table_, share_, segment, kTileBytes);
    segment_ = segment;
    dtype_ = stretch.dtype;
    begin_ = tile_;
    end_ = share_.end < table_.first_tile[segment + 1] ? share_.end : table_.first_tile[segment + 1];
    with_dtype(dtype_, [&](auto t) {
      const auto parts = split<decltype(t)>(stretch.data, stretch.count);
      packs_ = parts.packs;
      count_ = parts.count;
    });
  }

  const Table& table_;
  const Share& share_;
  uint32_t tile_;
  int segment_;
  uint32_t begin_, end_;  // the segment's tiles inside the share
  Pack* packs_;
  int64_t count_;
  DType dtype_;
};

// All loads of a group are under way before the first is used, whatever the dtypes.
template <class Table, int packs>
__device__ inline void load(Cursor<Table>& cursor, Pack (&group)[packs]) {
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const Place place = cursor.next();
    group[u] = place.taken ? *place.pack : Pack{};
  }
}

template <class N, class Table, int packs>
__device__ inline double lift(Cursor<Table>& cursor, const Pack (&group)[packs]) {
  double lifted = identity(N::kCombining);
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const Place place = cursor.next();
    if (!place.taken) continue;
    const Pack one[] = {group[u]};
    lifted =
        combine(N::kCombining, lifted, with_dtype(place.dtype, [&](auto t) { return lift<N, decltype(t)>(one, 0.0); }));
  }
  return lifted;
}

template <class Table, int packs>
__device__ inline void store(Cursor<Table>& cursor, const Pack (&group)[packs], const Scale& scale) {
#pragma unroll
  for (int u = 0; u < packs; ++u) {
    const Place place = cursor.next();
    if (place.taken)
      *place.pack = with_dtype(place.dtype, [&](auto t) { return rewritten<decltype(t)>(group[u], scale); });
  }
}

}  // namespace fusedclip::cuda
