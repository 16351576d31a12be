// How work is cut: every segment into tiles, the row of all tiles into shares of equal bytes. Pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../segment.h"

namespace fusedclip {

// One fp64 partial per tile, summed in tile order: results don't depend on how tiles are dealt to threads.
// 64 Ki elements keep a tile inside the second-level cache, and the partials of a 1 GB list in 32 KB.
constexpr int64_t kTileElements = 64 * 1024;

constexpr int64_t tiles_in(int64_t count) { return (count + kTileElements - 1) / kTileElements; }

// Tiles and bytes of a list of segments, as prefix sums of length segments + 1.
struct Tiling {
  std::vector<int64_t> first_tile{0};
  std::vector<int64_t> first_byte{0};

  void reserve(size_t segments) {
    first_tile.reserve(segments + 1);
    first_byte.reserve(segments + 1);
  }
  void add(const Segment& segment) {
    first_tile.push_back(first_tile.back() + tiles_in(segment.count));
    first_byte.push_back(first_byte.back() + segment.count * size_of(segment.dtype));
  }
  int64_t tiles() const { return first_tile.back(); }
  int64_t bytes() const { return first_byte.back(); }
};

// The last segment that begins at or before `position`; empty segments begin where the next one does and are skipped.
inline int64_t segment_at(const std::vector<int64_t>& first, int64_t position) {
  return std::upper_bound(first.begin(), first.end(), position) - first.begin() - 1;
}

// The first tile of share k of n: the tile that holds the byte at k/n of all bytes.
inline int64_t share_begin(const Tiling& tiling, const std::vector<Segment>& segments, int64_t k, int64_t n) {
  const int64_t byte = tiling.bytes() / n * k;
  if (k == 0) return 0;
  if (k == n || byte >= tiling.bytes()) return tiling.tiles();
  const int64_t s = segment_at(tiling.first_byte, byte);
  const int64_t tile_bytes = kTileElements * size_of(segments[s].dtype);
  return tiling.first_tile[s] + (byte - tiling.first_byte[s]) / tile_bytes;
}

struct Tile {
  int64_t segment;
  char* data;
  int64_t count;
};

inline Tile tile_of(const Tiling& tiling, const std::vector<Segment>& segments, int64_t segment, int64_t tile) {
  const Segment& s = segments[segment];
  const int64_t begin = (tile - tiling.first_tile[segment]) * kTileElements;
  return {segment, static_cast<char*>(s.data) + begin * size_of(s.dtype), std::min(kTileElements, s.count - begin)};
}

}  // namespace fusedclip
