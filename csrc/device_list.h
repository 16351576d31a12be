// The gradients of one device as they are found, and which of them count once. Included by gather.cpp only.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "tensor_list.h"
#include "torch_tensors.h"

namespace fusedclip {

// Neighbouring addresses to numbers far apart: allocators place equal gradients at equal distances, and with a single
// multiplication some distances would pile up. (The finalizer of MurmurHash3, Austin Appleby.)
inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

// Two entries are one if they hold the same gradient object, or if their gradients and their parameters occupy the same
// memory (tied weights with views of one buffer). Gradients of different parameters may lie in the same memory, too:
// autograd makes such for a + b. Each of them counts.
class DeviceList {
 public:
  // `owned`: the items are parameters, whose memory tells tied ones.
  DeviceList(DLDevice device, const py::list& items, bool owned) : items_(items), owned_(owned) {
    const size_t most = items.size();
    list.device = device;
    list.tensors = py::list(most);  // empty places, filled from the front: appending would cost 6 ns each
    list.segments.reserve(most);
    list.tiling.reserve(most);
  }

  bool is_on(const DLDevice& device) const { return is_same(list.device, device); }

  // The segment of the gradient that item i has.
  FUSEDCLIP_INLINE int64_t add(size_t i, py::object&& gradient, const Segment& segment) {
    const int64_t next = list.size();
    const int64_t first = first_in(segment, next);
    if (first >= 0) {
      const int64_t twin = twin_of(first, gradient.ptr(), i, next);
      if (twin != next) return twin;
      list.repeated.push_back(next);
    }
    Segment& kept = list.segments.emplace_back();
    kept.data = segment.data;  // one by one: copied at once they wait for what was stored just now (2 ns)
    kept.count = segment.count;
    kept.dtype = segment.dtype;
    list.tiling.add(segment);
    if (next != int64_t(i) || !item_of_.empty()) note_item(i, next);
    PyList_SET_ITEM(list.tensors.ptr(), next, gradient.release().ptr());
    return next;
  }

  std::shared_ptr<TensorList> finish() {
    const Py_ssize_t all = PyList_GET_SIZE(list.tensors.ptr());
    if (PyList_SetSlice(list.tensors.ptr(), list.size(), all, nullptr) != 0) throw py::error_already_set();
    return std::make_shared<TensorList>(std::move(list));
  }

  TensorList list;

 private:
  // The first segment in exactly this memory, or -1 if this one, which will be number `next`, is the first. Empty
  // segments own no memory.
  int64_t first_in(const Segment& s, int64_t next) {
    if (s.count == 0) return -1;
    const auto begin = reinterpret_cast<uintptr_t>(s.data), end = begin + s.count * size_of(s.dtype);
    if (begin >= highest_ || end <= lowest_) {  // beyond all others: allocators often go on in one direction
      if (end > highest_) highest_ = end;
      if (begin < lowest_) lowest_ = begin;
      return -1;
    }
    if (slots_.empty()) make_slots();
    for (; remembered_ < next; ++remembered_) remember(remembered_);
    const int64_t first = find_or_remember(s.data, s.count, s.dtype, next);
    if (first < 0) ++remembered_;
    return first;
  }

  void note_item(size_t i, int64_t segment) {
    if (item_of_.empty()) {
      item_of_.resize(segment);
      std::iota(item_of_.begin(), item_of_.end(), 0);
    }
    item_of_.push_back(static_cast<int32_t>(i));
  }

  void make_slots() {
    size_t capacity = 16;
    while (capacity < 2 * items_.size()) capacity *= 2;
    slots_.assign(capacity, -1);
  }

  void remember(int64_t number) {
    const Segment& s = list.segments[number];
    find_or_remember(s.data, s.count, s.dtype, number);
  }

  // Open addressing over the segments' addresses. (Not a Segment: one that has to lie in memory for this is copied into
  // the list by loads of 16 bytes that were stored as two times 8 just now, and these wait.)
  int64_t find_or_remember(void* data, int64_t count, DType dtype, int64_t number) {
    const size_t mask = slots_.size() - 1;
    size_t slot = mix(reinterpret_cast<uintptr_t>(data)) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask) {
      const Segment& other = list.segments[slots_[slot]];
      if (other.data == data && other.count == count && other.dtype == dtype) return slots_[slot];
    }
    slots_[slot] = static_cast<int32_t>(number);
    return -1;
  }

  // What makes two gradients in the memory of segment `first` the same one: an object, or a parameter's memory.
  using Key = std::tuple<int64_t, const void*, int64_t, uint64_t>;
  std::optional<Key> owner_key(int64_t first, size_t item) const {
    PyObject* const entry = PyList_GET_ITEM(items_.ptr(), item);
    const py::object owner = is_dtensor(entry) ? local_of(entry) : py::reinterpret_borrow<py::object>(entry);
    DLTensor t;
    if (!owned_ || !read_tensor(owner.ptr(), t) || !t.data || count_of(t) == 0) return std::nullopt;
    uint64_t layout = t.dtype.bits;  // of any dtype and layout: only equality matters
    if (!is_contiguous(t))
      for (int d = 0; d < t.ndim; ++d) layout = mix(mix(layout ^ t.shape[d]) ^ t.strides[d]);
    return Key{first, start_of(t), count_of(t), layout};
  }

  // The segment that this gradient is counted with, which is `next` if none is.
  int64_t twin_of(int64_t first, PyObject* gradient, size_t item, int64_t next) {
    if (PyList_GET_ITEM(list.tensors.ptr(), first) == gradient) return first;
    if (const auto key = owner_key(first, item_of_.empty() ? first : item_of_[first])) twins_.emplace(*key, first);
    const Key by_object{first, gradient, -1, 0};
    const std::optional<Key> by_owner = owner_key(first, item);
    int64_t twin = next;
    if (const auto known = twins_.find(by_object); known != twins_.end())
      twin = known->second;
    else if (by_owner)
      if (const auto tied = twins_.find(*by_owner); tied != twins_.end()) twin = tied->second;
    twins_.emplace(by_object, twin);
    if (by_owner) twins_.emplace(*by_owner, twin);
    if (twin != next) kept_.push_back(py::reinterpret_borrow<py::object>(gradient));
    return twin;
  }

  std::vector<py::object> kept_;  // twins: no other object may get the address of one meanwhile
  const py::list& items_;
  const bool owned_;
  uintptr_t lowest_ = UINTPTR_MAX, highest_ = 0;  // what is known of all segments without remembering each
  std::vector<int32_t> slots_;
  int64_t remembered_ = 0;        // segments that are in the slots, but for those whose memory was there
  std::vector<int32_t> item_of_;  // per segment; left empty while every item has the next segment
  std::map<Key, int64_t> twins_;
};

}  // namespace fusedclip
