#include "tensor_list.h"

#include <algorithm>
#include <array>

namespace fusedclip {
namespace {

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  const DLPackExchangeAPI* dlpack = nullptr;
} torch;

bool is_plain(PyObject* object) {
  // Subclasses and wrappers may keep their data elsewhere, and the exchange API doesn't say: exact types only.
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

bool is_tensor(PyObject* object) { return is_plain(object) || PyType_IsSubtype(Py_TYPE(object), torch.tensor); }

// The pending exception only means that this gradient needs a closer look; any other (an interrupt, say) goes on.
void forgive(PyObject* kind) {
  if (!PyErr_ExceptionMatches(kind)) throw py::error_already_set();
  PyErr_Clear();
}

std::optional<DType> dtype_of(DLDataType type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == kDLFloat && type.bits == 64) return DType::kFloat64;
  if (type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  return std::nullopt;
}

int64_t count_of(const DLTensor& t) {
  int64_t count = 1;
  for (int d = 0; d < t.ndim; ++d) count *= t.shape[d];
  return count;
}

// The elements fill one stretch of memory in row-major order.
bool is_contiguous(const DLTensor& t) {
  if (!t.strides) return true;
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

// The elements fill one stretch of memory in some order of the dimensions (channels-last, transposed).
bool is_dense(const DLTensor& t, int64_t count) {
  if (count == 0 || is_contiguous(t)) return true;
  constexpr int kMaxDims = 64;  // torch's own limit
  if (t.ndim > kMaxDims) return false;
  std::array<int, kMaxDims> order;
  int dims = 0;
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] != 1) order[dims++] = d;
  std::sort(order.begin(), order.begin() + dims, [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  int64_t expected = 1;
  for (int i = 0; i < dims; ++i) {
    if (t.strides[order[i]] != expected) return false;
    expected *= t.shape[order[i]];
  }
  return true;
}

// Neighbouring addresses to numbers far apart: allocators place equal gradients at equal distances, and with a single
// multiplication some distances would pile up. (The finalizer of MurmurHash3, Austin Appleby.)
uint64_t mix(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

// Where each stretch of memory was seen first: open addressing over the segments' addresses. Empty segments own no
// memory.
class SeenMemory {
 public:
  explicit SeenMemory(size_t most) {
    size_t capacity = 16;
    while (capacity < 2 * most) capacity *= 2;
    slots_.assign(capacity, -1);
  }

  // The index of an equal segment, or -1 after remembering this one, which will be number `next`.
  int64_t find_or_add(const std::vector<Segment>& segments, const Segment& s, int64_t next) {
    if (s.count == 0) return -1;
    const size_t mask = slots_.size() - 1;
    size_t slot = mix(reinterpret_cast<uintptr_t>(s.data)) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask) {
      const Segment& other = segments[slots_[slot]];
      if (other.data == s.data && other.count == s.count && other.dtype == s.dtype) return slots_[slot];
    }
    slots_[slot] = static_cast<int32_t>(next);
    return -1;
  }

 private:
  std::vector<int32_t> slots_;
};

// Reads one attribute of many objects. What C code has put into torch's own types (`grad`) comes before anything that
// an object may have and is the same for all: looking it up once per list takes 10 ns off each object. Everything else
// is asked of the object.
class Attribute {
 public:
  explicit Attribute(const py::object& name) : name_(name) {
    if (name.is_none()) return;
    tensor_getter_ = getter_of(torch.tensor);
    parameter_getter_ = getter_of(torch.parameter);
  }

  py::object of(PyObject* item) const {
    if (name_.is_none()) return py::reinterpret_borrow<py::object>(item);
    PyTypeObject* const type = Py_TYPE(item);
    const py::object* getter = nullptr;
    if (type == torch.parameter) getter = &parameter_getter_;
    if (type == torch.tensor) getter = &tensor_getter_;
    return py::reinterpret_steal<py::object>(
        getter && *getter ? PyGetSetDescr_Type.tp_descr_get(getter->ptr(), item, reinterpret_cast<PyObject*>(type))
                          : PyObject_GetAttr(item, name_.ptr()));
  }

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
};

std::optional<Segment> segment_of(const DLTensor& t) {
  const std::optional<DType> dtype = dtype_of(t.dtype);
  const int64_t count = count_of(t);
  if (!dtype || !is_dense(t, count) || (count > 0 && !t.data)) return std::nullopt;
  return Segment{static_cast<char*>(t.data) + t.byte_offset, count, *dtype};
}

}  // namespace

void bind_torch(py::object tensor_type, py::object parameter_type) {
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync || !api->current_work_stream)
    throw std::runtime_error("this torch's DLPack exchange API is version " +
                             std::to_string(api->header.version.major) + "; fusedclip reads version 1");
  // The types outlive the process's use of them.
  torch = {reinterpret_cast<PyTypeObject*>(tensor_type.release().ptr()),
           reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr()), api};
}

std::optional<TensorList> collect(const py::list& items, const py::object& attribute,
                                  std::optional<DLDeviceType> only_on) {
  if (!torch.dlpack) throw std::runtime_error("bind_torch() comes first");
  TensorList list;
  const size_t n = items.size();
  SeenMemory seen(n);
  const Attribute gradients(attribute);
  list.tensors = py::list(n);  // empty places, filled from the front: appending would cost 6 ns each
  list.segments.reserve(n);
  list.tiling.reserve(n);
  list.sources.assign(n, -1);
  for (size_t i = 0; i < n; ++i) {
    PyObject* const item = PyList_GET_ITEM(items.ptr(), i);
    if (!is_tensor(item)) return std::nullopt;
    py::object grad = gradients.of(item);
    if (!grad) return forgive(PyExc_AttributeError), std::nullopt;
    if (grad.is_none() && !attribute.is_none()) continue;
    DLTensor t;
    if (!is_plain(grad.ptr())) return std::nullopt;
    if (torch.dlpack->dltensor_from_py_object_no_sync(grad.ptr(), &t) != 0)
      return forgive(PyExc_Exception), std::nullopt;
    const std::optional<Segment> segment = segment_of(t);
    if (!segment) return std::nullopt;
    if (list.size() == 0) list.device = t.device;
    if (only_on && t.device.device_type != *only_on) return std::nullopt;
    if (t.device.device_type != list.device.device_type || t.device.device_id != list.device.device_id)
      return std::nullopt;

    const int64_t same = seen.find_or_add(list.segments, *segment, list.size());
    list.sources[i] = same >= 0 ? same : list.size();
    if (same >= 0) continue;
    list.segments.push_back(*segment);
    list.tiling.add(*segment);
    PyList_SET_ITEM(list.tensors.ptr(), list.size() - 1, grad.release().ptr());
    list.has_float64 |= segment->dtype == DType::kFloat64;
  }
  if (PyList_SetSlice(list.tensors.ptr(), list.size(), n, nullptr) != 0) throw py::error_already_set();
  return list;
}

void* current_stream(const TensorList& list) {
  void* stream = nullptr;
  if (torch.dlpack->current_work_stream(list.device.device_type, list.device.device_id, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

}  // namespace fusedclip
