#include "tensor_list.h"

#include <numeric>
#include <stdexcept>

#include "overlap.h"

namespace fusedclip {

std::vector<int64_t> sources_of(const Gathered& gathered) {
  if (!gathered.sources.empty()) return gathered.sources;
  std::vector<int64_t> places(gathered.items);
  std::iota(places.begin(), places.end(), 0);
  return places;
}

bool same_objects(const py::list& a, const py::list& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  return true;
}

int64_t source_of(const Gathered& gathered, size_t item) {
  if (item >= gathered.items) throw std::out_of_range("there is no such item");
  return gathered.sources.empty() ? static_cast<int64_t>(item) : gathered.sources[item];
}

uint32_t dtypes_of(const TensorList& list) {
  uint32_t bits = 0;
  for (const Segment& segment : list.segments) bits |= 1u << static_cast<int>(segment.dtype);
  return bits;
}

bool overlaps(const TensorList& list, const std::vector<std::pair<uintptr_t, int64_t>>& more) {
  std::vector<Segment> all = list.segments;
  const int64_t size = size_of(DType::kFloat16);
  for (const auto& [address, bytes] : more)
    all.push_back({reinterpret_cast<void*>(address), bytes / size, DType::kFloat16});
  return overlap(all);
}

}  // namespace fusedclip
