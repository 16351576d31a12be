// Python's view of the extension. No logic lives here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/engine.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "tensor_list.h"
#ifdef FUSEDCLIP_WITH_CUDA
#include "cuda/engine.h"
#endif

namespace fusedclip {
namespace {

cpu::Work work(const TensorList& list) { return {list.segments, list.tiling}; }

template <class F>
auto unlocked(F f) {
  const py::gil_scoped_release release;
  return f();
}

double* as_doubles(uintptr_t address) { return reinterpret_cast<double*>(address); }

constexpr int kMostSets = 4;

py::list instruction_sets() {
  const cpu::Kernels* sets[kMostSets];
  py::list names;
  for (int i = 0, n = cpu::kernel_sets(sets, kMostSets); i < n; ++i) names.append(sets[i]->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  const cpu::Kernels* sets[kMostSets];
  for (int i = 0, n = cpu::kernel_sets(sets, kMostSets); i < n; ++i)
    if (name == sets[i]->name) return cpu::use_kernels(*sets[i]);
  throw std::invalid_argument("this build or this processor has no instruction set " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled engines. Addresses are data_ptr() of contiguous fp64 tensors on the list's device.";
  m.attr("version") = FUSEDCLIP_VERSION;
  m.attr("has_threads") = cpu::kHasThreads;
  m.attr("cuda_architectures") = FUSEDCLIP_CUDA_ARCHITECTURES;  // empty: built without the CUDA half
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &use_instruction_set, "For tests: all sets return the same bits.");

  py::class_<TensorList>(m, "TensorList")
      .def("__len__", &TensorList::size)
      .def_readonly("tensors", &TensorList::tensors)
      .def_readonly("sources", &TensorList::sources)
      .def_readonly("has_float64", &TensorList::has_float64);
  m.def("bind_torch", &bind_torch);
  m.def("collect", &collect, py::arg("items"), py::arg("attribute").none(true));

  m.def("cpu_lift", [](const TensorList& l, double p, int threads, uintptr_t out) {
    unlocked([&] { cpu::lift(work(l), p, threads, as_doubles(out)); });
  });
  m.def("cpu_norm", [](const TensorList& l, double p, int threads) {
    return unlocked([&] { return cpu::norm(work(l), p, threads); });
  });
  m.def("cpu_clip", [](const TensorList& l, double p, double max_norm, double eps, bool zero_nonfinite, int threads) {
    const auto r = unlocked([&] { return cpu::clip(work(l), p, {max_norm, eps, zero_nonfinite}, threads); });
    return py::make_tuple(r.norm, r.coef);
  });
  m.def("cpu_scale", [](const TensorList& l, uintptr_t coefs, bool per_tensor, bool zero, int threads) {
    return unlocked([&] { return cpu::scale(work(l), as_doubles(coefs), per_tensor, zero, threads); });
  });
  m.def("cpu_clamp", [](const TensorList& l, double bound, int threads) {
    return unlocked([&] { return cpu::clamp(work(l), bound, threads); });
  });
#ifdef FUSEDCLIP_WITH_CUDA
  m.def("cuda_device_count", &cuda::device_count);
#endif
}

}  // namespace fusedclip
