// Calls that take a list of parameters whole: gather and pass at once. Python code between the two and after them is
// slow, as it finds the caches full of gradients (11 us of the 70 us for 300 tensors of 4,096).
#include <cmath>
#include <utility>

#include "bindings.h"

namespace fusedclip {
namespace {

// Whatever Python takes for true, which pybind11 does not.
bool as_bool(PyObject* truth) {
  const int value = PyObject_IsTrue(truth);
  if (value == -1) throw py::error_already_set();
  return value == 1;
}

// Before Python can run: an interrupt that came meanwhile is raised as soon as it does.
void note_written(const TensorList& l, const py::list& written) {
  if (PyList_SetSlice(written.ptr(), 0, 0, l.tensors.ptr()) != 0) throw py::error_already_set();
}

// cpu_clip_list(items, attribute, p, rule, only_finite, threads, written): gather and cpu_clip. Returns (norm, whether
// it is fp64) with the tensors that were written in `written`; or what was gathered, with nothing done, where the list
// is not an ordinary one on the CPU, or the norm is not finite and `only_finite` ones are wanted.
py::object clip_list(const py::list& items, PyObject* const* args) {
  const auto attribute = py::reinterpret_borrow<py::object>(args[0]), p = py::reinterpret_borrow<py::object>(args[1]);
  const ClipRule rule = as_rule(args[2]);
  const bool only_finite = as_bool(args[3]);
  const int threads = py::cast<int>(args[4]);
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
  const double norm = py::cast<double>(args[2]), coef = coefficient(norm, rule);
  const int threads = py::cast<int>(args[3]);
  const auto written = py::cast<py::list>(args[4]);
  Gathered gathered = gather(items, attribute, py::float_(2.0));
  if (!gathered.is_ordinary()) return py::cast(std::move(gathered));
  const TensorList& l = *gathered.lists[0];
  if (unlocked([&] { return cpu::scale(work(l), &coef, 0, rule.zero_nonfinite, threads); })) note_written(l, written);
  return py::none();
}

// Without pybind11, whose dispatch would be a tenth of the smallest call.
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

}  // namespace

ClipRule as_rule(PyObject* tuple) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) throw py::type_error("a rule is a tuple of three");
  const auto number = [&](int place) { return py::cast<double>(PyTuple_GET_ITEM(tuple, place)); };
  return {number(0), number(2), as_bool(PyTuple_GET_ITEM(tuple, 1))};
}

void bind_lists(py::module_& m) {
  define<clip_list, 7>(m, "cpu_clip_list");
  define<scale_list, 6>(m, "cpu_scale_list");
}

}  // namespace fusedclip
