#include "update_list.h"

#include <memory>

#include "overlap.h"
#include "torch_tensors.h"

namespace fusedclip {
namespace {

// Whether torch negates it on reading. Asked of single elements alone: of longer ones autograd makes imaginary parts of
// conjugates, which have gaps. (as_strided can take the gaps out by lying about them.)
bool is_negated(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Elements in the same order of memory.
bool is_laid_out_as(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  if (is_contiguous(a) && is_contiguous(b)) return true;
  if (!a.strides || !b.strides) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

class Reader {
 public:
  Reader(const py::tuple& states, const py::list& masters, const py::object& steps, UpdateList& list)
      : states_(states), masters_(masters), steps_(steps), list_(list) {
    if (states.size() > kMostStates) throw std::invalid_argument("no rule has so many states");
  }

  // False for what is not plain.
  bool read(size_t i, PyObject* parameter, PyObject* gradient, UpdateSegment& s) {
    DLTensor like, other;
    if (!flat(parameter, like)) return false;
    if (i == 0) list_.device = like.device;
    if (!is_same(like.device, list_.device)) return false;
    s.count = count_of(like);
    s.parameter = start_of(like);
    s.parameter_type = *dtype_of(like.dtype);
    if (!flat_like(gradient, like, other)) return false;
    if (s.count == 1 && (is_negated(parameter) || is_negated(gradient))) return false;
    s.gradient = start_of(other);
    s.gradient_type = *dtype_of(other.dtype);
    for (size_t k = 0; k < states_.size(); ++k) {
      PyObject* const state = PyList_GET_ITEM(py::handle(states_[k]).ptr(), i);
      if (!flat_like(state, like, other) || (s.count == 1 && is_negated(state))) return false;
      s.states[k] = start_of(other);
      s.state_types[k] = *dtype_of(other.dtype);
    }
    return read_master(PyList_GET_ITEM(masters_.ptr(), i), like, s) &&
           (steps_.is_none() || read_step(PyList_GET_ITEM(steps_.ptr(), i), s));
  }

 private:
  static bool flat(PyObject* tensor, DLTensor& t) {
    return is_plain(tensor) && read_tensor(tensor, t) && dtype_of(t.dtype) && is_flat(t, count_of(t));
  }

  static bool beside(PyObject* tensor, const DLTensor& like, DLTensor& t) {
    return is_plain(tensor) && read_tensor(tensor, t) && is_same(t.device, like.device) && is_laid_out_as(t, like);
  }

  static bool flat_like(PyObject* tensor, const DLTensor& like, DLTensor& t) {
    return beside(tensor, like, t) && dtype_of(t.dtype);
  }

  static bool read_master(PyObject* master, const DLTensor& like, UpdateSegment& s) {
    if (master == Py_None) return true;
    DLTensor t;
    if (!beside(master, like, t) || s.parameter_type == DType::kFloat64) return false;
    const bool is_split = dtype_of(t.dtype) == DType::kFloat16 && s.parameter_type == DType::kBFloat16;
    if (!is_split && dtype_of(t.dtype) != DType::kFloat32) return false;
    s.kept = is_split ? Master::kSplit : Master::kFloat32;
    s.master = start_of(t);
    return true;
  }

  bool read_step(PyObject* step, UpdateSegment& s) const {
    DLTensor t;
    if (!is_plain(step) || !read_tensor(step, t) || !is_same(t.device, list_.device)) return false;
    if (dtype_of(t.dtype) != DType::kFloat32 || count_of(t) != 1) return false;
    s.step = static_cast<float*>(start_of(t));
    return true;
  }

  const py::tuple& states_;
  const py::list& masters_;
  const py::object& steps_;
  UpdateList& list_;
};

}  // namespace

py::object gather_updates(const py::list& rows, const py::list& parameters, const py::list& gradients,
                          const py::tuple& states, const py::list& masters, const py::object& steps) {
  const size_t n = parameters.size();
  for (const py::handle stream : {py::handle(rows), py::handle(gradients), py::handle(masters)})
    if (py::len(stream) != n) throw std::invalid_argument("the streams have different lengths");
  for (const py::handle stream : states)
    if (!PyList_CheckExact(stream.ptr()) || py::len(stream) != n)
      throw std::invalid_argument("the states are lists with an item for each parameter");
  if (!steps.is_none() && (!PyList_CheckExact(steps.ptr()) || py::len(steps) != n))
    throw std::invalid_argument("the steps are a list with an item for each parameter");
  auto list = std::make_shared<UpdateList>();
  list->segments.reserve(n);
  list->parameters.reserve(n);
  list->tiling.reserve(n);
  Reader reader(states, masters, steps, *list);
  std::vector<PyObject* const*> streams;
  for (const py::handle stream : {py::handle(parameters), py::handle(gradients)})
    streams.push_back(PySequence_Fast_ITEMS(stream.ptr()));
  for (const py::handle stream : states) streams.push_back(PySequence_Fast_ITEMS(stream.ptr()));
  if (!steps.is_none()) streams.push_back(PySequence_Fast_ITEMS(steps.ptr()));
  py::list odd;
  for (size_t i = 0; i < n; ++i) {
    for (PyObject* const* stream : streams) prefetch_tensors(stream, i, n, false);
    UpdateSegment segment{};
    if (!reader.read(i, PyList_GET_ITEM(parameters.ptr(), i), PyList_GET_ITEM(gradients.ptr(), i), segment)) {
      odd.append(i);
      continue;
    }
    segment.row = static_cast<int32_t>(PyLong_AsLong(PyList_GET_ITEM(rows.ptr(), i)));
    list->segments.push_back(segment);
    list->parameters.push_back({segment.parameter, segment.count, segment.parameter_type});
    list->tiling.add(list->parameters.back());
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!odd.empty()) return odd;
  if (overlap(list->parameters))
    throw py::value_error(
        "two of the parameters share memory, which would be updated twice; give the optimizer one of them (tied "
        "weights are one Parameter in two places)");
  return py::cast(std::move(list));
}

std::vector<UpdateRow> rows_of(Update kind, const py::sequence& rules, const DLDevice& device) {
  const int options = with_update(kind, [](auto u) { return int(decltype(u)::kOptions); });
  std::vector<UpdateRow> rows;
  for (const py::handle rule : rules) {
    const auto numbers = py::reinterpret_borrow<py::sequence>(rule);
    UpdateRow row{};
    const bool is_number = !is_plain(py::object(numbers[0]).ptr());
    if (!is_number) row.lr = doubles_of(py::object(numbers[0]), device);
    for (int k = is_number ? 0 : 1; k < options; ++k) row.options[k] = numbers[k].cast<double>();
    row.maximize = numbers[py::len(numbers) - 1].cast<bool>();
    rows.push_back(row);
  }
  return rows;
}

}  // namespace fusedclip
