// The segments as the kernels see them, and how blocks share them out. Host and device, pure functions.
//
// Every segment is cut into tiles; block b of B takes the tiles [tiles * b / B, tiles * (b + 1) / B) of the row of all
// tiles. Going along the blocks, each step enters the next block or the next segment: a pair (block, segment) has the
// place block + segment in an array of B + T - 1 partial results, and no place is left out. Empty segments too get one.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace fusedclip::cuda {

// Passed by value: kernel parameters may have 32,764 bytes since CUDA 12.1.
template <int capacity>
struct Table {
  static constexpr int kCapacity = capacity;
  void* data[capacity];
  int64_t count[capacity];
  uint32_t first_tile[capacity + 1];  // a tile is at least 1 KiB: enough for 4 TiB
  DType dtype[capacity];
  int32_t size;
  int64_t place;  // of the first segment, in the list that was split into several tables

  FUSEDCLIP_HD uint32_t tiles() const { return first_tile[size]; }
};

// 21 bytes a segment. Launching with 32 KB of parameters copies 32 KB, so short lists get 4 KB and middling ones 11.
using SmallTable = Table<184>;
using MiddleTable = Table<512>;
using LargeTable = Table<1536>;

// What one block works on: tiles [begin, end), which lie in the segments [first, last], both included.
struct Share {
  uint32_t begin, end;
  int first, last;
};

// Part of one segment.
struct Stretch {
  char* data;
  int64_t count;
  DType dtype;
};

// The last segment that begins at or before the tile: empty segments begin where the next one does and are skipped.
template <class Table>
FUSEDCLIP_HD inline int segment_at(const Table& table, uint32_t tile) {
  int low = 0, high = table.size;  // first_tile[low] <= tile < first_tile[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_tile[middle] <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class Table>
FUSEDCLIP_HD inline Share share_of(const Table& table, uint32_t block, uint32_t blocks) {
  const uint64_t tiles = table.tiles();
  const uint32_t begin = uint32_t(tiles * block / blocks), end = uint32_t(tiles * (block + 1) / blocks);
  const int first = block == 0 ? 0 : segment_at(table, begin);
  const int last = block + 1 == blocks ? table.size - 1 : segment_at(table, end);
  return {begin, end, first, last};
}

// Tiles [begin, end), of which the segment's first has the number `first`.
struct Tiles {
  uint32_t first, begin, end;
};

// The share's part of the segment s: none, at times, of the first and the last.
template <class Table>
FUSEDCLIP_HD inline Tiles tiles_of(const Table& table, const Share& share, int s) {
  const uint32_t first = table.first_tile[s], next = table.first_tile[s + 1];
  return {first, share.begin > first ? share.begin : first, share.end < next ? share.end : next};
}

template <class Table>
FUSEDCLIP_HD inline Stretch stretch_of(const Table& table, const Share& share, int s, int64_t tile_bytes) {
  const Tiles tiles = tiles_of(table, share, s);
  const DType dtype = table.dtype[s];
  const int64_t tile = tile_bytes / size_of(dtype), offset = (tiles.begin - tiles.first) * tile;
  const int64_t tiled = (tiles.end - tiles.begin) * tile, left = table.count[s] - offset;
  return {static_cast<char*>(table.data[s]) + offset * size_of(dtype), tiled < left ? tiled : left, dtype};
}

// How many partial results there are.
template <class Table>
FUSEDCLIP_HD inline int64_t slots_of(const Table& table, int64_t blocks) {
  return blocks + table.size - 1;
}

// Where the partial results of the segment s begin; those of s + 1 follow. s = T gives their number.
template <class Table>
FUSEDCLIP_HD inline uint32_t slot_begin(const Table& table, int s, uint32_t blocks) {
  const uint64_t tile = table.first_tile[s];
  return uint32_t(s + (tile == 0 ? (s == table.size ? blocks - 1 : 0) : (tile * blocks - 1) / table.tiles()));
}

}  // namespace fusedclip::cuda
