// Python's view of the extension. No logic lives here.
#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/patterns.h"
#include "cpu/update.h"
#include "torch_tensors.h"
#include "update_list.h"

namespace fusedclip {
namespace {

py::object packed_sources(const Gathered& gathered) {
  const auto& sources = gathered.sources;
  if (sources.empty()) return py::none();
  return py::bytearray(reinterpret_cast<const char*>(sources.data()), sources.size() * sizeof(sources[0]));
}

py::tuple dtypes() {
#define FUSEDCLIP_TORCH_NAME(name, of_torch, type, code) of_torch,
  constexpr const char* kNames[] = {FUSEDCLIP_DTYPES(FUSEDCLIP_TORCH_NAME)};
#undef FUSEDCLIP_TORCH_NAME
  return py::tuple(py::cast(std::vector<const char*>(std::begin(kNames), std::end(kNames))));
}

py::list instruction_sets() {
  py::list names;
  for (const cpu::Kernels* set : cpu::kernel_sets()) names.append(set->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const cpu::Kernels* set : cpu::kernel_sets())
    if (name == set->name) return cpu::use_kernels(*set);
  throw std::invalid_argument("this build or this processor has no instruction set " + name);
}

// (streams, ahead, by_page), as Pattern has them.
using PatternTuple = std::tuple<int, int, bool>;
PatternTuple as_tuple(const cpu::Pattern& p) { return {p.streams, p.ahead, p.by_page}; }
cpu::Pattern as_pattern(const PatternTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled engines. Scalars and results are contiguous tensors on the list's device, fp64 but for norms.";
  m.attr("version") = FUSEDCLIP_VERSION;
  m.attr("dtypes") = dtypes();  // as torch calls them, by number
  m.attr("has_threads") = cpu::kHasThreads;
  m.attr("cuda_architectures") = FUSEDCLIP_CUDA_ARCHITECTURES;  // empty: built without the CUDA half
  m.def("instruction_sets", &instruction_sets);
  m.def("use_instruction_set", &use_instruction_set, "For tests: all sets return the same bits.");
  m.def("patterns", [] { return std::pair(as_tuple(cpu::patterns().read), as_tuple(cpu::patterns().write)); });
  m.def("use_patterns", [](const PatternTuple& read, const PatternTuple& write) {
    cpu::use_patterns({as_pattern(read), as_pattern(write)});
  });

  py::class_<TensorList, std::shared_ptr<TensorList>>(m, "TensorList")
      .def("__len__", &TensorList::size)
      .def_readonly("tensors", &TensorList::tensors)
      .def_readonly("repeated", &TensorList::repeated)
      .def_readonly("writes", &TensorList::writes)
      .def_readonly("has_float64", &TensorList::has_float64)
      .def_property_readonly("dtypes", &dtypes_of)
      .def("overlaps", &overlaps, py::arg("more"));
  py::class_<Gathered>(m, "Gathered")
      .def_readonly("lists", &Gathered::lists)
      .def_property_readonly("sources", &sources_of)
      .def_readonly("specs", &Gathered::specs)
      .def_readonly("dtensors", &Gathered::dtensors)
      .def_property_readonly("packed_sources", &packed_sources, "int64 each; None: item i has place i.")
      .def("source", &source_of, py::arg("item"))
      .def_readonly("survey", &Gathered::survey);
  m.def("bind_torch", &bind_torch);
  m.def("bind_survey", &bind_survey);
  m.def("same_objects", &same_objects, "Whether two lists hold the same objects.");
  m.def("gather", &gather, py::arg("items"), py::arg("attribute").none(true), py::arg("p").none(true));

  // A context: torch's own operations inside it neither read nor write subnormals as zeros, on any of its threads.
  py::class_<cpu::TeamUnderflow>(m, "TeamUnderflow")
      .def(py::init<int>(), py::arg("threads"))
      .def("__enter__", &cpu::TeamUnderflow::begin)
      .def("__exit__", [](cpu::TeamUnderflow& self, const py::args&) { self.end(); });

  using py::arg;
  const auto keywords = py::kw_only();
  m.def(
      "cpu_lift",
      [](const TensorList& l, double p, int threads, py::handle out) {
        double* const lifted = doubles_of(out, l.device);
        unlocked([&] { cpu::lift(work(l), p, threads, lifted); });
      },
      arg("list"), keywords, arg("p"), arg("threads"), arg("out"));
  m.def(
      "cpu_stats",
      [](const TensorList& l, int threads, py::handle out) {
        double* const rows = doubles_of(out, l.device);
        unlocked([&] { cpu::stats(work(l), threads, rows); });
      },
      arg("list"), keywords, arg("threads"), arg("out"));
  bind_lists(m);
  m.def(
      "cpu_clip",
      [](TensorList& l, double p, const py::tuple& rule, py::handle multiplier, py::handle lifted, int threads) {
        const ClipRule limit = as_rule(rule.ptr());
        const double factor = *doubles_of(multiplier, l.device);
        const double* const known = doubles_of(lifted, l.device);
        const auto r = unlocked([&] {
          return known ? cpu::settle_and_scale(work(l), p, *known, limit, factor, threads)
                       : cpu::clip(work(l), p, limit, factor, false, threads);
        });
        l.writes += r.coef != 1;
        return py::make_tuple(r.norm, r.coef);
      },
      "`lifted`, if it is a tensor, is what comes of a read pass that is then not made.", arg("list"), keywords,
      arg("p"), arg("rule"), arg("multiplier"), arg("lifted"), arg("threads"));
  m.def(
      "cpu_scale",
      [](TensorList& l, py::handle coef, bool per_tensor, bool zero, int threads) {
        const double* const coefs = doubles_of(coef, l.device);
        const bool wrote = unlocked([&] { return cpu::scale(work(l), coefs, per_tensor, zero, threads); });
        l.writes += wrote;
        return wrote;
      },
      arg("list"), keywords, arg("coef"), arg("per_tensor"), arg("zero"), arg("threads"));
  m.def(
      "cpu_clamp",
      [](TensorList& l, double bound, int threads) -> py::object {
        const std::vector<bool> written = unlocked([&] { return cpu::clamp(work(l), bound, threads); });
        l.writes += !written.empty();
        const bool all = std::find(written.begin(), written.end(), false) == written.end();
        return all ? py::bool_(!written.empty()) : py::cast(written);
      },
      "Whether all segments were written, or none; or, for each, whether it was.", arg("list"), keywords, arg("bound"),
      arg("threads"));
  py::class_<UpdateList, std::shared_ptr<UpdateList>>(m, "UpdateList").def_readonly("updates", &UpdateList::updates);
  m.def("gather_updates", &gather_updates, arg("rows"), arg("parameters"), arg("gradients"), arg("states"),
        arg("masters"), arg("steps").none(true));
  m.def(
      "cpu_update",
      [](UpdateList& l, const std::string& kind, const py::sequence& rules, py::handle coefs, py::handle skip,
         int threads) {
        const Update rule = update_of(kind);
        const std::vector<UpdateRow> rows = rows_of(rule, rules, l.device);
        const UpdateWork work{l.segments, rule, rows, doubles_of(coefs, l.device), flag_of(skip, l.device)};
        l.updates += unlocked([&] { return cpu::update(work, l.parameters, l.tiling, threads); });
      },
      arg("list"), keywords, arg("kind"), arg("rules"), arg("coefs"), arg("skip").none(true), arg("threads"));
#ifdef FUSEDCLIP_WITH_CUDA
  bind_cuda(m);
#endif
}

}  // namespace fusedclip
