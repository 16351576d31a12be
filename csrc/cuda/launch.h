// From a list of segments to launches: the tables that hold it, and one checked launch.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "device.h"
#include "engine.h"
#include "table.h"

namespace fusedclip::cuda {

inline int64_t tables_of(const Work& work) {
  const int64_t n = int64_t(work.segments.size());
  return std::max<int64_t>(1, (n + LargeTable::kCapacity - 1) / LargeTable::kCapacity);
}

// Segments [place, place + size) of the list.
template <class Table>
void fill(Table& table, const std::vector<Segment>& segments, size_t place, size_t size, int64_t tile_bytes) {
  table.place = int64_t(place);
  table.size = int(size);
  const int shift = __builtin_ctzll(uint64_t(tile_bytes));  // a division would double this loop's time
  int64_t tiles = 0;
  for (size_t s = 0; s < size; ++s) {
    const Segment& segment = segments[place + s];
    with_dtype(segment.dtype, [](auto) {});  // throws for one that the kernels do not know
    table.data[s] = segment.data;
    table.count[s] = segment.count;
    table.dtype[s] = segment.dtype;
    table.first_tile[s] = uint32_t(tiles);
    tiles += (segment.count * size_of(segment.dtype) + tile_bytes - 1) >> shift;
  }
  if (tiles > UINT32_MAX)
    throw std::runtime_error("the CUDA engine takes at most 2^32 tiles of " + std::to_string(tile_bytes) +
                             " bytes in a launch; these gradients have " + std::to_string(tiles));
  table.first_tile[size] = uint32_t(tiles);
}

// Calls f(table, number) for one table after the other of `size` segments each, fewer in the last.
template <class Table, class F>
void for_each_table_of(size_t size, const Work& work, const Device& device, F f) {
  const size_t n = work.segments.size();
  Table table;
  for (size_t place = 0, number = 0; number == 0 || place < n; place += size, ++number) {
    fill(table, work.segments, place, std::min(size, n - place), tile_bytes(device.policy));
    f(table, int(number));
  }
}

// As few tables as hold all segments.
template <class F>
void for_each_table(const Work& work, const Device& device, F f) {
  if (work.segments.size() <= SmallTable::kCapacity)
    for_each_table_of<SmallTable>(SmallTable::kCapacity, work, device, f);
  else if (work.segments.size() <= MiddleTable::kCapacity)
    for_each_table_of<MiddleTable>(MiddleTable::kCapacity, work, device, f);
  else
    for_each_table_of<LargeTable>(LargeTable::kCapacity, work, device, f);
}

// A tile is the least that is worth a block.
template <class Table>
int blocks_for(const Table& table, int most) {
  return int(std::clamp<int64_t>(table.tiles(), 1, most));
}

enum class Start {
  kInTurn,
  kEarly,     // where a device can: while the kernel before it ends, for which it waits inside
  kTogether,  // all blocks at once, which have a barrier across the grid
};

struct Shape {
  int blocks;
  Start start = Start::kInTurn;
  size_t shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t try_launch(const Work& work, const Device& device, const Shape& shape, void (*kernel)(Parameters...),
                       Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  if (shape.start == Start::kTogether) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(device.policy.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(work.stream);
  config.attrs = &attribute;
  config.numAttrs = shape.start == Start::kTogether || (shape.start == Start::kEarly && device.programmatic) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <class Kernel, class... Arguments>
void launch(const char* name, const Work& work, const Device& device, const Shape& shape, Kernel kernel,
            Arguments&&... arguments) {
  check(try_launch(work, device, shape, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace fusedclip::cuda
