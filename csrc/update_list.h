// Parameters with their gradients and states -> segments of an update.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/tiling.h"
#include "dlpack.h"
#include "update_work.h"

namespace fusedclip {

namespace py = pybind11;

// Of backends.Streams, which keeps the memory alive.
struct UpdateList {
  std::vector<UpdateSegment> segments;
  std::vector<Segment> parameters;  // the same memory, for tiling
  Tiling tiling;
  DLDevice device{kDLCPU, 0};
  int64_t updates = 0;  // how often an engine has written to them, so that an interrupt cannot hide it
};

// The segments of the streams (lists of tensors of the same length; see backends/updater.py). Or the places of those
// that are not plain tensors of one device in memory of one order, as a Python list.
py::object gather_updates(const py::list& rows, const py::list& parameters, const py::list& gradients,
                          const py::tuple& states, const py::list& masters, const py::object& steps);

// Of updates.py's rules: a kind's options, where the learning rate is, and whether it maximizes.
std::vector<UpdateRow> rows_of(Update kind, const py::sequence& rules, const DLDevice& device);

}  // namespace fusedclip
