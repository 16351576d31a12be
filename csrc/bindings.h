// What the parts of Python's view share.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/engine.h"
#include "tensor_list.h"

namespace fusedclip {

// Calls that take a list of parameters whole: cpu_clip_list, cpu_scale_list.
void bind_lists(py::module_& m);

// cuda_missing and all that the CUDA engine does.
void bind_cuda(py::module_& m);

// norms.ClipRule.
ClipRule as_rule(PyObject* tuple);

inline cpu::Work work(const TensorList& list) { return {list.segments, list.tiling}; }

template <class F>
auto unlocked(F f) {
  const py::gil_scoped_release release;
  return f();
}

}  // namespace fusedclip
