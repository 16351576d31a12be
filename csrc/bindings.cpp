// Python's view of the extension. No logic lives here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "cpu/engine.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/patterns.h"
#include "cpu/update.h"
#include "tensor_list.h"
#include "torch_tensors.h"
#include "update_list.h"
#ifdef FUSEDCLIP_WITH_CUDA
#include "cuda/engine.h"
#include "cuda/update.h"
#endif

namespace fusedclip {
namespace {

cpu::Work work(const TensorList& list) { return {list.segments, list.tiling}; }

template <class F>
auto unlocked(F f) {
  const py::gil_scoped_release release;
  return f();
}

#ifdef FUSEDCLIP_WITH_CUDA
cuda::Work cuda_work(const TensorList& l) { return {l.segments, l.device.device_id, current_stream(l.device)}; }
#endif

double as_double(PyObject* number) {
  const double value = PyFloat_AsDouble(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

int as_int(PyObject* number) {
  const long value = PyLong_AsLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<int>(value);
}

bool as_bool(PyObject* truth) {
  const int value = PyObject_IsTrue(truth);
  if (value == -1) throw py::error_already_set();
  return value == 1;
}

// norms.ClipRule.
ClipRule as_rule(PyObject* tuple) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) throw py::type_error("a rule is a tuple of three");
  const double max_norm = as_double(PyTuple_GET_ITEM(tuple, 0)), eps = as_double(PyTuple_GET_ITEM(tuple, 2));
  return {max_norm, eps, as_bool(PyTuple_GET_ITEM(tuple, 1))};
}

// Before Python can run: an interrupt that came meanwhile is raised as soon as it does.
void note_written(const TensorList& l, const py::list& written) {
  if (PyList_SetSlice(written.ptr(), 0, 0, l.tensors.ptr()) != 0) throw py::error_already_set();
}

// cpu_clip_list(items, attribute, p, rule, only_finite, threads, written): gather and cpu_clip at once. Python code
// between the two and after them is slow, as it finds the caches full of gradients (11 us of the 70 us for 300 tensors
// of 4,096). Returns (norm, whether it is fp64) with the tensors that were written in `written`; or what was gathered,
// with nothing done, where the list is not an ordinary one on the CPU, or the norm is not finite and `only_finite` ones
// are wanted.
py::object clip_list(const py::list& items, PyObject* const* args) {
  const auto attribute = py::reinterpret_borrow<py::object>(args[0]), p = py::reinterpret_borrow<py::object>(args[1]);
  const ClipRule rule = as_rule(args[2]);
  const bool only_finite = as_bool(args[3]);
  const int threads = as_int(args[4]);
  const auto written = py::cast<py::list>(args[5]);
  Gathered gathered = gather(items, attribute, p);
  if (!gathered.is_ordinary()) return py::cast(std::move(gathered));
  const TensorList& l = *gathered.lists[0];
  const double order = p.cast<double>();
  const auto r = unlocked([&] { return cpu::clip(work(l), order, rule, 1.0, only_finite, threads); });
  if (only_finite && !std::isfinite(r.norm)) return py::cast(std::move(gathered));
  if (r.coef != 1) note_written(l, written);
  return py::make_tuple(r.norm, l.has_float64);
}

// cpu_scale_list(items, attribute, rule, norm, threads, written): the same for a norm that is known. Returns None, or
// what was gathered.
py::object scale_list(const py::list& items, PyObject* const* args) {
  const auto attribute = py::reinterpret_borrow<py::object>(args[0]);
  const ClipRule rule = as_rule(args[1]);
  const double norm = as_double(args[2]), coef = coefficient(norm, rule);
  const int threads = as_int(args[3]);
  const auto written = py::cast<py::list>(args[4]);
  Gathered gathered = gather(items, attribute, py::float_(2.0));
  if (!gathered.is_ordinary()) return py::cast(std::move(gathered));
  const TensorList& l = *gathered.lists[0];
  if (unlocked([&] { return cpu::scale(work(l), &coef, 0, rule.zero_nonfinite, threads); })) note_written(l, written);
  return py::none();
}

// What takes a list whole is called without pybind11, whose dispatch would be a tenth of the smallest call.
template <py::object (*function)(const py::list&, PyObject* const*), int count>
PyObject* call_with_list(PyObject*, PyObject* const* args, Py_ssize_t given) {
  try {
    if (given != count || !PyList_CheckExact(args[0]) || !PyList_CheckExact(args[count - 1]))
      throw py::type_error("wants items: list, ..., written: list");
    return function(py::reinterpret_borrow<py::list>(args[0]), args + 1).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <py::object (*function)(const py::list&, PyObject* const*), int count>
void define(py::module_& m, const char* name) {
  static PyMethodDef definition{name,
                                reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_with_list<function, count>)),
                                METH_FASTCALL, nullptr};
  m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr)));
}

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
  define<clip_list, 7>(m, "cpu_clip_list");
  define<scale_list, 6>(m, "cpu_scale_list");
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
  // On torch's current stream; none waits for the device.
  m.def("cuda_missing", &cuda::missing);
  m.def("cuda_scratch_doubles", [](const TensorList& l) { return cuda::scratch_doubles(cuda_work(l)); });
  m.def("cuda_fits_on_chip", [](const TensorList& l, double p) { return cuda::fits_on_chip(cuda_work(l), p); });
  m.def(
      "cuda_lift",
      [](const TensorList& l, double p, py::handle scratch, py::handle out) {
        const cuda::Work work = cuda_work(l);
        double *const space = doubles_of(scratch, l.device), *const lifted = doubles_of(out, l.device);
        unlocked([&] { cuda::lift(work, p, space, lifted); });
      },
      arg("list"), keywords, arg("p"), arg("scratch"), arg("out"));
  m.def("cuda_stats_scratch_doubles", [](const TensorList& l) { return cuda::stats_scratch_doubles(cuda_work(l)); });
  m.def(
      "cuda_stats",
      [](const TensorList& l, py::handle scratch, py::handle out) {
        const cuda::Work work = cuda_work(l);
        double *const space = doubles_of(scratch, l.device), *const rows = doubles_of(out, l.device);
        unlocked([&] { cuda::stats(work, space, rows); });
      },
      arg("list"), keywords, arg("scratch"), arg("out"));
  m.def(
      "cuda_norm",
      [](const TensorList& l, double p, py::handle scratch, py::handle norm) {
        const cuda::Work work = cuda_work(l);
        const NormPlace place = norm_place_of(norm, l.device);
        double* const space = doubles_of(scratch, l.device);
        unlocked([&] { cuda::norm(work, p, space, {place.address, place.is_double, nullptr}); });
      },
      arg("list"), keywords, arg("p"), arg("scratch"), arg("norm"));
  m.def(
      "cuda_clip",
      [](TensorList& l, double p, const py::tuple& rule, py::handle max_norm, py::handle multiplier, py::handle lifted,
         py::handle scratch, py::handle norm, py::handle coef, int form) {
        const cuda::Work work = cuda_work(l);
        const cuda::Limits limits{as_rule(rule.ptr()), doubles_of(max_norm, l.device),
                                  doubles_of(multiplier, l.device)};
        const NormPlace place = norm_place_of(norm, l.device);
        const cuda::Results results{place.address, place.is_double, doubles_of(coef, l.device)};
        const double* const known = doubles_of(lifted, l.device);
        double* const space = doubles_of(scratch, l.device);
        unlocked([&] {
          known ? cuda::settle_and_scale(work, p, limits, known, results)
                : cuda::clip(work, p, limits, space, results, static_cast<cuda::Form>(form));
        });
        ++l.writes;
      },
      "`max_norm`, if it is a tensor, replaces the rule's; `lifted` is what comes of a read pass that is then not "
      "made.",
      arg("list"), keywords, arg("p"), arg("rule"), arg("max_norm"), arg("multiplier"), arg("lifted"), arg("scratch"),
      arg("norm"), arg("coef"), arg("form"));
  m.def(
      "cuda_scale",
      [](TensorList& l, py::handle coef, bool per_tensor, bool zero) {
        const cuda::Work work = cuda_work(l);
        const double* const coefs = doubles_of(coef, l.device);
        unlocked([&] { cuda::scale(work, coefs, per_tensor, zero); });
        ++l.writes;
      },
      arg("list"), keywords, arg("coef"), arg("per_tensor"), arg("zero"));
  m.def(
      "cuda_clamp",
      [](TensorList& l, double bound) {
        const cuda::Work work = cuda_work(l);
        unlocked([&] { cuda::clamp(work, bound); });
        ++l.writes;
      },
      arg("list"), keywords, arg("bound"));
  m.attr("cuda_update_scratch_doubles") = cuda::kPreparedDoubles;  // for each parameter
  m.def(
      "cuda_update",
      [](UpdateList& l, const std::string& kind, const py::sequence& rules, py::handle coefs, py::handle skip,
         py::handle scratch) {
        const Update rule = update_of(kind);
        const std::vector<UpdateRow> rows = rows_of(rule, rules, l.device);
        const UpdateWork work{l.segments, rule, rows, doubles_of(coefs, l.device), flag_of(skip, l.device)};
        const cuda::Work parameters{l.parameters, l.device.device_id, current_stream(l.device)};
        double* const space = doubles_of(scratch, l.device);
        unlocked([&] { cuda::update(work, parameters, space); });
        ++l.updates;
      },
      arg("list"), keywords, arg("kind"), arg("rules"), arg("coefs"), arg("skip").none(true), arg("scratch"));
#endif
}

}  // namespace fusedclip
