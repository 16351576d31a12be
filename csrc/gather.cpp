// A list of parameters to the memory of their gradients, in one sweep.
#include "device_list.h"

namespace fusedclip {
namespace {

// Reads one attribute of many objects. What C code has put into torch's own types (`grad`) comes before anything that
// an object may have and is the same for all: looking it up once per list takes 10 ns off each object. Everything else
// is asked of the object.
class Attribute {
 public:
  explicit Attribute(const py::object& name) : name_(name) {
    if (name.is_none()) return;
    is_grad_ = PyUnicode_CompareWithASCIIString(name.ptr(), "grad") == 0;
    tensor_getter_ = getter_of(torch.tensor);
    parameter_getter_ = getter_of(torch.parameter);
  }

  // Null where the object has no such attribute.
  py::object of(PyObject* item) const {
    if (name_.is_none()) return py::reinterpret_borrow<py::object>(item);
    PyTypeObject* const type = Py_TYPE(item);
    const py::object* getter = nullptr;
    if (type == torch.parameter) getter = &parameter_getter_;
    if (type == torch.tensor) getter = &tensor_getter_;
    py::object found = py::reinterpret_steal<py::object>(
        getter && *getter ? PyGetSetDescr_Type.tp_descr_get(getter->ptr(), item, reinterpret_cast<PyObject*>(type))
                          : PyObject_GetAttr(item, name_.ptr()));
    if (!found) forgive(PyExc_AttributeError);
    return found;
  }

  // Whether asking runs no code but torch's.
  bool is_quick(PyObject* item) const {
    return name_.is_none() || (Py_TYPE(item) == torch.parameter && parameter_getter_) ||
           (Py_TYPE(item) == torch.tensor && tensor_getter_);
  }

  // Whether it may be asked for: the .grad of a tensor that is no leaf makes torch warn. Parameters are leaves.
  bool may_be_asked(PyObject* item) const {
    if (!is_grad_ || Py_TYPE(item) != torch.tensor) return true;
    const py::object is_leaf = py::reinterpret_steal<py::object>(PyObject_GetAttrString(item, "is_leaf"));
    if (!is_leaf) throw py::error_already_set();
    return is_leaf.ptr() == Py_True;
  }

  // Whether None says all: a tensor that is no leaf never gets a .grad, which is worth a closer look.
  bool settles_none(PyObject* item) const { return Py_TYPE(item) == torch.parameter || !is_grad_; }

 private:
  // Null unless the type has such an attribute and nobody has changed how its attributes are found.
  py::object getter_of(PyTypeObject* type) const {
    if (type->tp_getattro != PyObject_GenericGetAttr) return {};
    PyObject* const found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_.ptr());
    if (!found) return forgive(PyExc_AttributeError), py::object();
    const py::object descriptor = py::reinterpret_steal<py::object>(found);
    return Py_TYPE(found) == &PyGetSetDescr_Type ? descriptor : py::object();
  }

  const py::object& name_;
  py::object tensor_getter_, parameter_getter_;
  bool is_grad_ = false;
};

// While it lives, torch asks no subclass of Tensor for its __torch_function__: looking for it makes reading the .grad
// of a DTensor take three times as long.
class WithoutTorchFunction {
 public:
  WithoutTorchFunction() : context_(py::module_::import("torch._C").attr("DisableTorchFunctionSubclass")()) {
    context_.attr("__enter__")();
  }
  ~WithoutTorchFunction() {
    const py::error_scope pending;  // an error that is on its way stays
    if (!PyObject_CallMethod(context_.ptr(), "__exit__", "OOO", Py_None, Py_None, Py_None)) PyErr_Clear();
  }

 private:
  py::object context_;
};

class Sweep {
 public:
  Sweep(const py::list& items, const py::object& attribute, const py::object& p)
      : items_(items), attribute_(attribute), p_(p), gradients_(attribute) {}

  Gathered run() {
    const size_t n = items_.size();
    const bool for_gradients = !attribute_.is_none();
    found_.items = n;
    for (size_t i = 0; i < n; ++i) {
      PyObject* const item = PyList_GET_ITEM(items_.ptr(), i);
      prefetch_tensors(PySequence_Fast_ITEMS(items_.ptr()), i, n, for_gradients);
      if (!take(i, item)) look_closer(i, item);
    }
    if (devices_.size() > 1) renumber();
    for (const auto& device : devices_) found_.lists.push_back(device->finish());
    return std::move(found_);
  }

 private:
  // False for what only a survey knows.
  FUSEDCLIP_INLINE bool take(size_t i, PyObject* item) {
    if (!is_plain(item) && !PyType_IsSubtype(Py_TYPE(item), torch.tensor)) return false;
    if (Py_TYPE(item) != torch.parameter && !gradients_.may_be_asked(item)) return false;
    if (!gradients_.is_quick(item)) own_items();
    py::object gradient = gradients_.of(item);
    if (!gradient) return false;
    if (gradient.is_none())
      return (is_plain(item) ? gradients_.settles_none(item) : is_sharded_leaf(i, item)) && note(i, -1);
    if (!is_plain(gradient.ptr())) gradient = unwrapped(i, std::move(gradient));
    DLTensor t;
    if (!is_plain(gradient.ptr()) || !read_tensor(gradient.ptr(), t)) return false;
    // Not segment_of: an optional lies in memory, and copying it from there waits for what was stored just now (5 ns).
    const std::optional<DType> dtype = dtype_of(t.dtype);
    const int64_t count = count_of(t);
    if (!dtype || !is_flat(t, count)) return false;
    add(i, std::move(gradient), {start_of(t), count, *dtype}, t.device);
    if (*dtype == DType::kFloat64) last_->list.has_float64 = true;
    return true;
  }

  // Of a DTensor its local tensor, having noted where it belongs.
  py::object unwrapped(size_t i, py::object&& gradient) {
    if (!is_dtensor(gradient.ptr())) return std::move(gradient);
    note_spec(i, gradient.ptr());
    PyList_SetItem(found_.dtensors.ptr(), i, py::object(gradient).release().ptr());
    return local_of(gradient.ptr());
  }

  // Whether it is a DTensor that may have a gradient some day: its ranks take part without one.
  bool is_sharded_leaf(size_t i, PyObject* item) {
    if (!is_dtensor(item)) return false;
    note_spec(i, item);
    return py::handle(item).attr("is_leaf").cast<bool>();
  }

  void note_spec(size_t i, PyObject* dtensor) {
    if (found_.specs.is_none()) {
      quick_.emplace();
      const py::list none(py::make_tuple(py::none()));
      found_.specs = none * py::int_(items_.size());
      found_.dtensors = none * py::int_(items_.size());
    }
    PyList_SetItem(found_.specs.ptr(), i, spec_of(dtensor).release().ptr());
  }

  // Before code that is not ours or torch's runs, which may change the caller's list.
  void own_items() {
    if (owned_) return;
    items_ = py::reinterpret_steal<py::list>(PyList_GetSlice(items_.ptr(), 0, PyList_GET_SIZE(items_.ptr())));
    if (!items_) throw py::error_already_set();
    owned_ = true;
  }

  void look_closer(size_t i, PyObject* item) {
    own_items();
    if (found_.survey.is_none()) found_.survey = py::reinterpret_borrow<py::object>(torch.survey)(attribute_, p_);
    py::object stand_in = found_.survey.attr("look")(i, py::handle(item));
    if (stand_in.is_none()) {
      if (is_dtensor(item)) note_spec(i, item);
      return void(note(i, -1));
    }
    found_.has_stand_ins = true;
    if (py::isinstance<py::int_>(stand_in)) {
      const size_t same = stand_in.cast<size_t>();
      note(i, found_.sources.empty() ? same : found_.sources[same]);
      if (!list_of_.empty()) list_of_[i] = list_of_[same];
      return;
    }
    DLTensor t;
    const bool is_read = is_plain(stand_in.ptr()) && read_tensor(stand_in.ptr(), t);
    const std::optional<Segment> segment = is_read ? segment_of(t) : std::nullopt;
    if (!segment) throw std::runtime_error("the survey gave a tensor that is not plain");
    add(i, std::move(stand_in), *segment, t.device);
  }

  FUSEDCLIP_INLINE void add(size_t i, py::object&& gradient, const Segment& segment, const DLDevice& device) {
    const int64_t place = list_on(device).add(i, std::move(gradient), segment);
    if (place != int64_t(i) || !found_.sources.empty()) note(i, place);
    if (several_) note_list(i);
  }

  // Where item i's gradient is, in its list; always true.
  bool note(size_t i, int64_t place) {
    if (found_.sources.empty()) spell_out(i);
    found_.sources[i] = place;
    return true;
  }

  // The places of the items before i, which were those of the items themselves.
  void spell_out(size_t i) {
    found_.sources.assign(found_.items, -1);
    std::iota(found_.sources.begin(), found_.sources.begin() + i, 0);
  }

  FUSEDCLIP_INLINE DeviceList& list_on(const DLDevice& device) {
    if (!last_ || !last_->is_on(device)) last_ = find(device);
    return *last_;
  }

  DeviceList* find(const DLDevice& device) {
    for (const auto& known : devices_)
      if (known->is_on(device)) return known.get();
    several_ = !devices_.empty();
    devices_.push_back(std::make_unique<DeviceList>(device, items_, !attribute_.is_none()));
    return devices_.back().get();
  }

  // Items before the second device are all in the first list.
  void note_list(size_t i) {
    list_of_.resize(items_.size());
    while (devices_[list_of_[i]].get() != last_) ++list_of_[i];
  }

  // From places in one of the lists to places in all lists one after another.
  void renumber() {
    if (found_.sources.empty()) spell_out(found_.items);
    std::vector<int64_t> offsets{0};
    for (const auto& device : devices_) offsets.push_back(offsets.back() + device->list.size());
    for (size_t i = 0; i < found_.sources.size(); ++i)
      if (found_.sources[i] >= 0) found_.sources[i] += offsets[list_of_[i]];
  }

  py::list items_;
  bool owned_ = false;
  const py::object& attribute_;
  const py::object& p_;
  const Attribute gradients_;
  std::vector<std::unique_ptr<DeviceList>> devices_;
  std::optional<WithoutTorchFunction> quick_;
  DeviceList* last_ = nullptr;  // the list that was added to last
  bool several_ = false;
  std::vector<int32_t> list_of_;
  Gathered found_;
};

}  // namespace

Gathered gather(const py::list& items, const py::object& attribute, const py::object& p) {
  if (!torch.dlpack || !torch.survey) throw std::runtime_error("bind_torch() and bind_survey() come first");
  return Sweep(items, attribute, p).run();
}

}  // namespace fusedclip
