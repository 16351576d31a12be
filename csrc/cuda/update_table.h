// The segments of an update as its kernels see them, shared out as table.h has it. Host and device, pure functions.
#pragma once

#include "../update_work.h"
#include "launch_policy.h"
#include "table.h"

namespace fusedclip::cuda {

constexpr int kSide = 4;               // elements side by side: 16 bytes of a float
constexpr int kChunk = kWarp * kSide;  // elements that a warp takes at a time

struct TableRow {
  UpdateRow rule;
  const double* coef;
};

// Passed by value like the other. A segment's `row` is one of the table's.
template <int capacity, int rows_capacity>
struct UpdateTable {
  static constexpr int kCapacity = capacity, kRows = rows_capacity;
  UpdateSegment segments[capacity];
  TableRow rows[rows_capacity];
  uint32_t first_tile[capacity + 1];
  uint32_t tile[capacity];  // chunks, so many that tiles of all segments have about the same bytes
  bool wide[capacity];      // whether whole chunks go Together
  int32_t size;
  int64_t place;

  FUSEDCLIP_HD uint32_t tiles() const { return first_tile[size]; }
};
using SmallUpdateTable = UpdateTable<40, 6>;
using LargeUpdateTable = UpdateTable<320, 48>;

// Elements of a segment; a share's part of one is below 2^31. Counting chunks spares registers.
struct Range {
  uint32_t first_chunk;
  int count;
};

template <class Table>
FUSEDCLIP_HD inline Range range_of(const Table& table, const Share& share, int s) {
  const Tiles tiles = tiles_of(table, share, s);
  const uint32_t first_chunk = (tiles.begin - tiles.first) * table.tile[s];
  const int64_t tiled = int64_t(tiles.end - tiles.begin) * table.tile[s] * kChunk;
  const int64_t left = table.segments[s].count - int64_t(first_chunk) * kChunk;
  return {first_chunk, int(tiled < left ? tiled : left)};
}

}  // namespace fusedclip::cuda
