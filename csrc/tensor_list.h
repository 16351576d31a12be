// Gradients -> flat segments: the one place that looks inside Python's tensors, through DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "dlpack.h"
#include "tiling.h"

namespace fusedclip {

namespace py = pybind11;

// The gradients of one device, ready to be read and written in place, each stretch of memory once.
struct TensorList {
  py::list tensors;  // one per segment; keeps the memory alive
  std::vector<Segment> segments;
  Tiling tiling;
  std::vector<int64_t> sources;  // per item of that list: its segment, or -1 where there was no gradient
  DLDevice device{kDLCPU, 0};
  bool has_float64 = false;

  int64_t size() const { return static_cast<int64_t>(segments.size()); }
};

// Remembers torch's tensor types and its exchange API. Called once, at import, before anything else here.
void bind_torch(py::object tensor_type, py::object parameter_type);

// The gradients of `items`: each item's attribute `attribute`, or the items themselves if none is named.
// std::nullopt if any of them is not a plain one (exact type, one supported dtype, dense, all on one device, which is
// of type `only_on` if that is given): fusedclip/grads.py then goes through them one by one, with a reason for what it
// refuses.
std::optional<TensorList> collect(const py::list& items, const py::object& attribute,
                                  std::optional<DLDeviceType> only_on = std::nullopt);

// The stream that torch is working on just now, on the list's device.
void* current_stream(const TensorList& list);

}  // namespace fusedclip
