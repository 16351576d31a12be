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

// Subclasses and wrappers may keep their data elsewhere, and the exchange API doesn't say: exact types only.
bool is_plain_type(PyTypeObject* type) { return type == torch.tensor || type == torch.parameter; }

bool is_plain(PyObject* object) { return is_plain_type(Py_TYPE(object)); }

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

// Where each stretch of memory was seen first: open addressing over the segments' addresses. Empty segments own no
// memory.
class SeenMemory {
 public:
  explicit SeenMemory(size_t most) {
    while (capacity() < 2 * most) ++bits_;
    slots_.assign(capacity(), -1);
  }

  // The index of an equal segment, or -1 after remembering this one, which will be number `next`.
  int64_t find_or_add(const std::vector<Segment>& segments, const Segment& s, int64_t next) {
    if (s.count == 0) return -1;
    // Fibonacci hashing (Knuth, TAOCP 3, 6.4): the top bits of the product by 2^64 over the golden ratio spread even
    // addresses at equal distances, which is how allocators place equal gradients.
    size_t slot = (reinterpret_cast<uintptr_t>(s.data) * uint64_t{0x9e3779b97f4a7c15}) >> (64 - bits_);
    for (; slots_[slot] >= 0; slot = (slot + 1) & (capacity() - 1)) {
      const Segment& other = segments[slots_[slot]];
      if (other.data == s.data && other.count == s.count && other.dtype == s.dtype) return slots_[slot];
    }
    slots_[slot] = static_cast<int32_t>(next);
    return -1;
  }

 private:
  size_t capacity() const { return size_t{1} << bits_; }

  int bits_ = 4;
  std::vector<int32_t> slots_;
};

// Reads one attribute of many objects.
class Attribute {
 public:
  explicit Attribute(const py::object& name) : name_(name) {}

  py::object of(PyObject* item) {
    if (name_.is_none()) return py::reinterpret_borrow<py::object>(item);
    if (Py_TYPE(item) != type_) look_up(Py_TYPE(item));
    return py::reinterpret_steal<py::object>(get_ ? get_(descriptor_.ptr(), item, reinterpret_cast<PyObject*>(type_))
                                                  : PyObject_GetAttr(item, name_.ptr()));
  }

 private:
  // What C code has put into a type comes before anything that an object may have, and is the same for all of them:
  // asking the type once takes 10 ns off each of them. Anything else is asked of every object.
  void look_up(PyTypeObject* type) {
    type_ = type;
    descriptor_ = py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_.ptr()));
    if (!descriptor_) PyErr_Clear();
    const bool is_getter = descriptor_ && Py_TYPE(descriptor_.ptr()) == &PyGetSetDescr_Type && is_plain_type(type);
    get_ = is_getter ? PyGetSetDescr_Type.tp_descr_get : nullptr;
  }

  const py::object& name_;
  PyTypeObject* type_ = nullptr;
  py::object descriptor_;
  descrgetfunc get_ = nullptr;
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

std::optional<TensorList> collect(const py::list& items, const py::object& attribute) {
  if (!torch.dlpack) throw std::runtime_error("bind_torch() comes first");
  TensorList list;
  const size_t n = items.size();
  SeenMemory seen(n);
  Attribute gradients(attribute);
  list.segments.reserve(n);
  list.tiling.reserve(n);
  list.sources.assign(n, -1);
  for (size_t i = 0; i < n; ++i) {
    PyObject* const item = PyList_GET_ITEM(items.ptr(), i);
    if (!is_tensor(item)) return std::nullopt;
    const py::object grad = gradients.of(item);
    if (!grad) return forgive(PyExc_AttributeError), std::nullopt;
    if (grad.is_none() && !attribute.is_none()) continue;
    DLTensor t;
    if (!is_plain(grad.ptr())) return std::nullopt;
    if (torch.dlpack->dltensor_from_py_object_no_sync(grad.ptr(), &t) != 0)
      return forgive(PyExc_Exception), std::nullopt;
    const std::optional<Segment> segment = segment_of(t);
    if (!segment) return std::nullopt;
    if (list.size() == 0) list.device = t.device;
    if (t.device.device_type != list.device.device_type || t.device.device_id != list.device.device_id)
      return std::nullopt;

    const int64_t same = seen.find_or_add(list.segments, *segment, list.size());
    list.sources[i] = same >= 0 ? same : list.size();
    if (same >= 0) continue;
    list.segments.push_back(*segment);
    list.tiling.add(*segment);
    list.tensors.append(grad);
    list.has_float64 |= segment->dtype == DType::kFloat64;
  }
  return list;
}

void* current_stream(const TensorList& list) {
  void* stream = nullptr;
  if (torch.dlpack->current_work_stream(list.device.device_type, list.device.device_id, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

}  // namespace fusedclip
