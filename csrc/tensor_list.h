// Gradients -> flat segments, a list per device.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/tiling.h"
#include "dlpack.h"

namespace fusedclip {

namespace py = pybind11;

// The gradients of one device, ready to be read and written in place.
struct TensorList {
  py::list tensors;  // one per segment; keeps the memory alive
  std::vector<Segment> segments;
  Tiling tiling;
  // Segments that lie in the memory of an earlier one, of another parameter: they count, and are written with it.
  std::vector<int64_t> repeated;
  DLDevice device{kDLCPU, 0};
  int64_t writes = 0;        // how often an engine has written to them, so that an interrupt cannot hide it
  bool has_float64 = false;  // among the gradients that were taken as they are

  int64_t size() const { return static_cast<int64_t>(segments.size()); }
};

// The gradients of a list of parameters.
struct Gathered {
  std::vector<std::shared_ptr<TensorList>> lists;  // one per device, in the order of first appearance
  size_t items = 0;
  std::vector<int64_t> sources;    // as sources_of gives them; left empty where every item has the next place
  py::object survey = py::none();  // what took a closer look, if anything needed one
  // Per item, None where there is none: the placement of its DTensor (the gradient; the item itself if that is
  // missing), and the gradient, which is written with its local tensor. Both are None themselves where no item has a
  // DTensor.
  py::object specs = py::none(), dtensors = py::none();
  bool has_stand_ins = false;  // some segments stand for gradients that could not be taken as they are

  // Plain dense gradients on the CPU, each stretch of memory once: nothing is left for Python to think about.
  bool is_ordinary() const {
    return lists.size() == 1 && lists[0]->device.device_type == kDLCPU && !has_stand_ins &&
           lists[0]->repeated.empty() && specs.is_none();
  }
};

// Per item: the place of its gradient in the lists one after another, -1 for none.
std::vector<int64_t> sources_of(const Gathered& gathered);
int64_t source_of(const Gathered& gathered, size_t item);

// The gradients of `items`: each item's attribute `attribute`, or the items themselves if none is named.
//
// What is not plain (exact type, supported dtype, dense) goes to a survey(attribute, p), made when it is first needed:
// look(i, item) gives None where there is no gradient, the number of an earlier item with the same one, or a plain
// tensor to read in its stead; or raises. The survey knows why (fusedclip/gradients/survey.py).
Gathered gather(const py::list& items, const py::object& attribute, const py::object& p);

// Remembers which gradients were measured, until were_measured is asked once. None of them is kept alive for it.
void remember_measured(const TensorList& list);

// Whether the gradients of `items` are those, one by one: what can be said against gradients was said when they were
// measured. By their addresses, which others may have by now, so that nothing may be read or written on its word.
bool were_measured(const py::list& items, const py::object& attribute);

// Whether two lists hold the same objects, in the same order.
bool same_objects(const py::list& a, const py::list& b);

// Bit DType for each that a segment has.
uint32_t dtypes_of(const TensorList& list);

// Whether any two of its segments, or of these stretches of memory (address, bytes) beside them, share a byte.
bool overlaps(const TensorList& list, const std::vector<std::pair<uintptr_t, int64_t>>& more);

}  // namespace fusedclip
