#include "tensor_list.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "overlap.h"

// The sweep's inner loop is one piece: called one by one, its parts cost 5 ns more per tensor.
#define FUSEDCLIP_INLINE __attribute__((always_inline)) inline

namespace fusedclip {
namespace {

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* survey = nullptr;
  const DLPackExchangeAPI* dlpack = nullptr;
} torch;

bool is_plain(PyObject* object) {
  // Subclasses and wrappers may keep their data elsewhere, and the exchange API doesn't say: exact types only.
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

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
FUSEDCLIP_INLINE bool is_contiguous(const DLTensor& t) {
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
bool is_dense(const DLTensor& t) {
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

// A tensor of an exact type, as DLPack has it.
FUSEDCLIP_INLINE bool read_tensor(PyObject* tensor, DLTensor& t) {
  if (torch.dlpack->dltensor_from_py_object_no_sync(tensor, &t) == 0) return true;
  return forgive(PyExc_Exception), false;
}

// Its flat memory, or nothing if it is not plain.
FUSEDCLIP_INLINE std::optional<Segment> segment_of(const DLTensor& t) {
  const std::optional<DType> dtype = dtype_of(t.dtype);
  const int64_t count = count_of(t);
  if (!dtype || (count > 0 && (!t.data || !(is_contiguous(t) || is_dense(t))))) return std::nullopt;
  return Segment{static_cast<char*>(t.data) + t.byte_offset, count, *dtype};
}

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

// Neighbouring addresses to numbers far apart: allocators place equal gradients at equal distances, and with a single
// multiplication some distances would pile up. (The finalizer of MurmurHash3, Austin Appleby.)
uint64_t mix(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

// The gradients of one device as they are found, and which of them count once.
//
// Two entries are one if they hold the same gradient object, or if their gradients and their parameters occupy the same
// memory (tied weights with views of one buffer). Gradients of different parameters may lie in the same memory, too:
// autograd makes such for a + b. Each of them counts.
class DeviceList {
 public:
  DeviceList(DLDevice device, size_t most) : most_(most) {
    list.device = device;
    list.tensors = py::list(most);  // empty places, filled from the front: appending would cost 6 ns each
    list.segments.reserve(most);
    list.tiling.reserve(most);
    owners_.reserve(most);
  }

  bool is_on(const DLDevice& device) const {
    return list.device.device_type == device.device_type && list.device.device_id == device.device_id;
  }

  // The segment of this gradient; `owner` is its parameter, or null.
  FUSEDCLIP_INLINE int64_t add(py::object&& gradient, const Segment& segment, PyObject* owner) {
    const int64_t next = list.size();
    const int64_t first = first_in(segment, next);
    if (first >= 0) {
      const int64_t twin = twin_of(first, gradient.ptr(), owner, next);
      if (twin != next) return twin;
      list.repeated.push_back(next);
    }
    list.segments.push_back(segment);
    list.tiling.add(segment);
    owners_.push_back(owner);
    PyList_SET_ITEM(list.tensors.ptr(), next, gradient.release().ptr());
    return next;
  }

  std::shared_ptr<TensorList> finish() {
    const Py_ssize_t all = PyList_GET_SIZE(list.tensors.ptr());
    if (PyList_SetSlice(list.tensors.ptr(), list.size(), all, nullptr) != 0) throw py::error_already_set();
    return std::make_shared<TensorList>(std::move(list));
  }

  TensorList list;

 private:
  // The first segment in exactly this memory, or -1 if this one, which will be number `next`, is the first. Empty
  // segments own no memory.
  int64_t first_in(const Segment& s, int64_t next) {
    if (s.count == 0) return -1;
    const auto begin = reinterpret_cast<uintptr_t>(s.data), end = begin + s.count * size_of(s.dtype);
    if (begin >= highest_ || end <= lowest_) {  // beyond all others: allocators often go on in one direction
      if (end > highest_) highest_ = end;
      if (begin < lowest_) lowest_ = begin;
      return -1;
    }
    if (slots_.empty()) make_slots();
    for (; remembered_ < next; ++remembered_) remember(remembered_);
    const int64_t first = find_or_remember(s.data, s.count, s.dtype, next);
    if (first < 0) ++remembered_;
    return first;
  }

  void make_slots() {
    size_t capacity = 16;
    while (capacity < 2 * most_) capacity *= 2;
    slots_.assign(capacity, -1);
  }

  void remember(int64_t number) {
    const Segment& s = list.segments[number];
    find_or_remember(s.data, s.count, s.dtype, number);
  }

  // Open addressing over the segments' addresses. (Not a Segment: one that has to lie in memory for this is copied into
  // the list by loads of 16 bytes that were stored as two times 8 just now, and these wait.)
  int64_t find_or_remember(void* data, int64_t count, DType dtype, int64_t number) {
    const size_t mask = slots_.size() - 1;
    size_t slot = mix(reinterpret_cast<uintptr_t>(data)) & mask;
    for (; slots_[slot] >= 0; slot = (slot + 1) & mask) {
      const Segment& other = list.segments[slots_[slot]];
      if (other.data == data && other.count == count && other.dtype == dtype) return slots_[slot];
    }
    slots_[slot] = static_cast<int32_t>(number);
    return -1;
  }

  // What makes two gradients in the memory of segment `first` the same one: an object, or a parameter's memory.
  using Key = std::tuple<int64_t, const void*, int64_t, int>;
  static std::optional<Key> owner_key(int64_t first, PyObject* owner) {
    DLTensor t;
    if (!owner || !is_plain(owner) || !read_tensor(owner, t)) return std::nullopt;
    const std::optional<Segment> memory = segment_of(t);
    if (!memory || memory->count == 0) return std::nullopt;
    return Key{first, memory->data, memory->count, static_cast<int>(memory->dtype)};
  }

  // The segment that this gradient is counted with, which is `next` if none is.
  int64_t twin_of(int64_t first, PyObject* gradient, PyObject* owner, int64_t next) {
    if (PyList_GET_ITEM(list.tensors.ptr(), first) == gradient) return first;
    if (const auto key = owner_key(first, owners_[first])) twins_.emplace(*key, first);
    const Key by_object{first, gradient, -1, 0};
    const std::optional<Key> by_owner = owner_key(first, owner);
    int64_t twin = next;
    if (const auto known = twins_.find(by_object); known != twins_.end())
      twin = known->second;
    else if (by_owner)
      if (const auto tied = twins_.find(*by_owner); tied != twins_.end()) twin = tied->second;
    twins_.emplace(by_object, twin);
    if (by_owner) twins_.emplace(*by_owner, twin);
    return twin;
  }

  size_t most_;
  uintptr_t lowest_ = UINTPTR_MAX, highest_ = 0;  // what is known of all segments without remembering each
  std::vector<int32_t> slots_;
  int64_t remembered_ = 0;         // segments that are in the slots, but for those whose memory was there
  std::vector<PyObject*> owners_;  // borrowed: the caller's list holds them
  std::map<Key, int64_t> twins_;
};

class Sweep {
 public:
  Sweep(const py::list& items, const py::object& attribute, const py::object& p)
      : items_(items), attribute_(attribute), p_(p), gradients_(attribute), owned_(!attribute.is_none()) {}

  Gathered run() {
    const size_t n = items_.size();
    found_.sources.assign(n, -1);
    for (size_t i = 0; i < n; ++i) {
      PyObject* const item = PyList_GET_ITEM(items_.ptr(), i);
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
    if (!gradients_.may_be_asked(item)) return false;
    py::object gradient = gradients_.of(item);
    if (!gradient) return false;
    if (gradient.is_none()) return gradients_.settles_none(item);
    DLTensor t;
    if (!is_plain(gradient.ptr()) || !read_tensor(gradient.ptr(), t)) return false;
    const std::optional<Segment> segment = segment_of(t);
    if (!segment) return false;
    add(i, item, std::move(gradient), *segment, t.device);
    if (segment->dtype == DType::kFloat64) last_->list.has_float64 = true;
    return true;
  }

  void look_closer(size_t i, PyObject* item) {
    if (found_.survey.is_none()) found_.survey = py::reinterpret_borrow<py::object>(torch.survey)(attribute_, p_);
    py::object stand_in = found_.survey.attr("look")(i, py::handle(item));
    if (stand_in.is_none()) return;
    found_.has_stand_ins = true;
    if (py::isinstance<py::int_>(stand_in)) {
      const size_t same = stand_in.cast<size_t>();
      found_.sources[i] = found_.sources[same];
      if (!list_of_.empty()) list_of_[i] = list_of_[same];
      return;
    }
    DLTensor t;
    const bool is_read = is_plain(stand_in.ptr()) && read_tensor(stand_in.ptr(), t);
    const std::optional<Segment> segment = is_read ? segment_of(t) : std::nullopt;
    if (!segment) throw std::runtime_error("the survey gave a tensor that is not plain");
    add(i, item, std::move(stand_in), *segment, t.device);
  }

  FUSEDCLIP_INLINE void add(size_t i, PyObject* item, py::object&& gradient, const Segment& segment,
                            const DLDevice& device) {
    found_.sources[i] = list_on(device).add(std::move(gradient), segment, owned_ ? item : nullptr);
    if (devices_.size() > 1) note_list(i);
  }

  FUSEDCLIP_INLINE DeviceList& list_on(const DLDevice& device) {
    if (!last_ || !last_->is_on(device)) last_ = find(device);
    return *last_;
  }

  DeviceList* find(const DLDevice& device) {
    for (const auto& known : devices_)
      if (known->is_on(device)) return known.get();
    devices_.push_back(std::make_unique<DeviceList>(device, items_.size()));
    return devices_.back().get();
  }

  // Items before the second device are all in the first list.
  void note_list(size_t i) {
    list_of_.resize(items_.size());
    while (devices_[list_of_[i]].get() != last_) ++list_of_[i];
  }

  // From places in one of the lists to places in all lists one after another.
  void renumber() {
    std::vector<int64_t> offsets{0};
    for (const auto& device : devices_) offsets.push_back(offsets.back() + device->list.size());
    for (size_t i = 0; i < found_.sources.size(); ++i)
      if (found_.sources[i] >= 0) found_.sources[i] += offsets[list_of_[i]];
  }

  const py::list& items_;
  const py::object& attribute_;
  const py::object& p_;
  const Attribute gradients_;
  const bool owned_;
  std::vector<std::unique_ptr<DeviceList>> devices_;
  DeviceList* last_ = nullptr;  // the list that was added to last
  std::vector<int32_t> list_of_;
  Gathered found_;
};

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
           reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr()), nullptr, api};
}

void bind_survey(py::object survey_type) { torch.survey = survey_type.release().ptr(); }

Gathered gather(const py::list& items, const py::object& attribute, const py::object& p) {
  if (!torch.dlpack || !torch.survey) throw std::runtime_error("bind_torch() and bind_survey() come first");
  return Sweep(items, attribute, p).run();
}

bool overlaps(const TensorList& list, const std::vector<std::pair<uintptr_t, int64_t>>& more) {
  std::vector<Segment> all = list.segments;
  const int64_t size = size_of(DType::kFloat16);
  for (const auto& [address, bytes] : more)
    all.push_back({reinterpret_cast<void*>(address), bytes / size, DType::kFloat16});
  return overlap(all);
}

void* current_stream(const TensorList& list) {
  void* stream = nullptr;
  if (torch.dlpack->current_work_stream(list.device.device_type, list.device.device_id, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

}  // namespace fusedclip
