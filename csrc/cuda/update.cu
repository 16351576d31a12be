// Updates as launches. Compiled with -fmad=false: updates.h asks for every operation to be rounded by itself.
#include "launch.h"
#include "update.cuh"
#include "update.h"

namespace fusedclip::cuda {
namespace {

static_assert(sizeof(LargeUpdateTable) + 32 <= 32764, "the most that parameters may take");

constexpr int64_t kUpdateTileBytes = 32 * 1024;

// Calls f(stream, dtype, times that it is moved) for each that a segment has.
template <class F>
void for_each_stream(const UpdateSegment& s, F f) {
  f(s.gradient, s.gradient_type, 1);
  f(s.parameter, s.parameter_type, s.kept == Master::kFloat32 ? 1 : 2);
  for (int k = 0; k < kMostStates; ++k)
    if (s.states[k]) f(s.states[k], s.state_types[k], 2);
  if (s.kept != Master::kNone) f(s.master, s.kept == Master::kSplit ? DType::kBFloat16 : DType::kFloat32, 2);
}

int64_t bytes_of_element(const UpdateSegment& s) {
  int64_t bytes = 0;
  for_each_stream(s, [&](const void*, DType type, int times) { bytes += times * size_of(type); });
  return bytes;
}

bool is_wide(const UpdateSegment& s) {
  bool wide = true;
  for_each_stream(s, [&](const void* stream, DType type, int) {
    const uintptr_t bytes = uintptr_t(kSide * size_of(type));
    wide = wide && bytes <= sizeof(Pack) && reinterpret_cast<uintptr_t>(stream) % bytes == 0;
  });
  return wide;
}

// Segments from `place` on, as many as it takes.
template <class Table>
void fill(Table& table, const UpdateWork& work, size_t place) {
  table.place = int64_t(place);
  table.size = 0;
  uint32_t tiles = 0;
  int rows = 0;
  std::vector<int> numbers;
  for (; place < work.segments.size() && table.size < Table::kCapacity; ++place, ++table.size) {
    const int s = table.size;
    UpdateSegment& segment = table.segments[s] = work.segments[place];
    const auto known = std::find(numbers.begin(), numbers.end(), segment.row);
    const int row = int(known - numbers.begin());
    if (known == numbers.end()) {
      if (rows == Table::kRows) break;
      numbers.push_back(segment.row);
      table.rows[rows++] = {work.rows.at(size_t(segment.row)), work.coefs + segment.row};
    }
    segment.row = row;
    table.wide[s] = is_wide(segment);
    table.tile[s] = uint32_t(std::max<int64_t>(1, kUpdateTileBytes / bytes_of_element(segment) / kChunk));
    table.first_tile[s] = tiles;
    const int64_t tile = int64_t(table.tile[s]) * kChunk;
    tiles += uint32_t((segment.count + tile - 1) / tile);
  }
  table.first_tile[table.size] = tiles;
}

const Kernels& kernels() {
  static const Kernels all = [] {
    Kernels k{};
#define FUSEDCLIP_ADD(name, ...)                                                                                       \
  for (const void* one :                                                                                               \
       {address(prepare_kernel<__VA_ARGS__, SmallUpdateTable>),                                                        \
        address(prepare_kernel<__VA_ARGS__, LargeUpdateTable>), address(update_kernel<__VA_ARGS__, SmallUpdateTable>), \
        address(update_kernel<__VA_ARGS__, LargeUpdateTable>)})                                                        \
    k.streaming.push_back(one);
    FUSEDCLIP_UPDATES(FUSEDCLIP_ADD)
#undef FUSEDCLIP_ADD
    return k;
  }();
  return all;
}

template <class Table>
void update_with(const UpdateWork& update, const Work& parameters, const Device& device, double* scratch) {
  Table table;
  for (size_t place = 0; place < update.segments.size(); place += size_t(table.size)) {
    fill(table, update, place);
    with_update(update.rule, [&](auto u) {
      using U = decltype(u);
      launch("prepare_kernel", parameters, device, {(table.size + kWarp - 1) / kWarp}, prepare_kernel<U, Table>, table,
             update.skip, scratch);
      launch("update_kernel", parameters, device, {blocks_for(table, device.max_blocks), Start::kEarly},
             update_kernel<U, Table>, table, update.skip, scratch);
    });
  }
}

}  // namespace

void update(const UpdateWork& update, const Work& parameters, double* scratch) {
  const Device& device = made_ready(parameters.device, kernels());
  if (update.segments.size() <= SmallUpdateTable::kCapacity && update.rows.size() <= SmallUpdateTable::kRows)
    update_with<SmallUpdateTable>(update, parameters, device, scratch);
  else
    update_with<LargeUpdateTable>(update, parameters, device, scratch);
}

}  // namespace fusedclip::cuda
