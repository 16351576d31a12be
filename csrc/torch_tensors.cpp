#include "torch_tensors.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace fusedclip {

Torch torch;

namespace {

// Which of the first words at `from` holds this address; 0 if none does, or there is none.
int word_with(const void* from, const py::object& address, int words) {
  const auto sought = address.cast<uintptr_t>();
  if (!sought) return 0;
  const auto* const word = static_cast<const uintptr_t*>(from);
  const auto* const found = std::find(word, word + words, sought);
  return found == word + words ? 0 : int(found - word);
}

void find_parts(const py::object& tensor_type) {
  const py::object tensor = tensor_type();
  const py::object part = py::getattr(tensor, "_cdata", py::int_(0));
  const int words = int(Py_TYPE(tensor.ptr())->tp_basicsize / sizeof(void*));
  torch.part = word_with(tensor.ptr(), part, words);
  if (!torch.part) return;
  const py::object storage = py::getattr(tensor.attr("untyped_storage")(), "_cdata", py::int_(0));
  torch.storage = word_with(reinterpret_cast<void*>(part.cast<uintptr_t>()), storage, 4);
}

}  // namespace

void bind_torch(py::object tensor_type, py::object parameter_type) {
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync || !api->current_work_stream)
    throw std::runtime_error("this torch's DLPack exchange API is version " +
                             std::to_string(api->header.version.major) + "; fusedclip reads version 1");
  const py::object made_by = tensor_type;
  // The types outlive the process's use of them.
  torch = {reinterpret_cast<PyTypeObject*>(tensor_type.release().ptr()),
           reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr()), nullptr, api};
  find_parts(made_by);
}

void bind_survey(py::object survey_type) { torch.survey = survey_type.release().ptr(); }

bool is_dtensor(PyObject* object) {
  if (Py_TYPE(object) == Py_TYPE(Py_None) || is_plain(object)) return false;
  if (!torch.dtensor) {
    const py::object modules = py::module_::import("sys").attr("modules");
    const py::object module = modules.attr("get")("torch.distributed.tensor");
    if (!py::hasattr(module, "DTensor")) return false;
    torch.dtensor = reinterpret_cast<PyTypeObject*>(py::object(module.attr("DTensor")).release().ptr());
  }
  return PyType_IsSubtype(Py_TYPE(object), torch.dtensor);
}

namespace {

py::object slot_of(PyObject* object, PyObject* name) {
  PyObject* const found = PyObject_GetAttr(object, name);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

}  // namespace

py::object local_of(PyObject* dtensor) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return slot_of(dtensor, name);
}

py::object spec_of(PyObject* dtensor) {
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  return slot_of(dtensor, name);
}

void* current_stream(const DLDevice& device) {
  void* stream = nullptr;
  if (torch.dlpack->current_work_stream(device.device_type, device.device_id, &stream) != 0)
    throw py::error_already_set();
  return stream;
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

namespace {

Segment result_of(py::handle tensor, const DLDevice& device) {
  DLTensor t;
  if (is_plain(tensor.ptr()) && read_tensor(tensor.ptr(), t) && is_same(t.device, device) && is_contiguous(t))
    if (const std::optional<Segment> segment = segment_of(t)) return *segment;
  throw py::type_error("a scalar or a result must be a contiguous tensor of fp32 or fp64 beside the gradients");
}

}  // namespace

double* doubles_of(py::handle tensor, const DLDevice& device) {
  if (tensor.is_none()) return nullptr;
  const Segment segment = result_of(tensor, device);
  if (segment.dtype != DType::kFloat64) throw py::type_error("a scalar or a result must be fp64");
  return static_cast<double*>(segment.data);
}

const float* flag_of(py::handle tensor, const DLDevice& device) {
  if (tensor.is_none()) return nullptr;
  const Segment segment = result_of(tensor, device);
  if (segment.dtype != DType::kFloat32) throw py::type_error("a flag is fp32");
  return static_cast<const float*>(segment.data);
}

NormPlace norm_place_of(py::handle tensor, const DLDevice& device) {
  const Segment segment = result_of(tensor, device);
  if (segment.dtype != DType::kFloat64 && segment.dtype != DType::kFloat32)
    throw py::type_error("a norm is fp32 or fp64");
  return {segment.data, segment.dtype == DType::kFloat64};
}

}  // namespace fusedclip
