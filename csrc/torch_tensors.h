// Python's tensors, through DLPack: the one place that looks inside them.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "dlpack.h"
#include "segment.h"

// What looks at every gradient of a list is one piece of code: called one by one, its parts cost 5 ns more per tensor.
#define FUSEDCLIP_INLINE __attribute__((always_inline)) inline

namespace fusedclip {

namespace py = pybind11;

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* survey = nullptr;
  const DLPackExchangeAPI* dlpack = nullptr;
  PyTypeObject* dtensor = nullptr;  // null until a list holds something that may be one
  // Which word of a tensor's object leads to torch's own part of it, and which of that to its storage; 0 if none is
  // known. For prefetch_tensors() alone: whatever a torch has there, nothing but time depends on it.
  int part = 0, storage = 0;
};
extern Torch torch;

// Remembers torch's tensor types and its exchange API. Called once, at import, before anything else here.
void bind_torch(py::object tensor_type, py::object parameter_type);

// Remembers the type that takes closer looks.
void bind_survey(py::object survey_type);

// Whether it is a DTensor. Asked only of what is not plain: importing the type takes seconds, so it is looked for when
// a list holds what may be of it, which somebody has imported it for.
bool is_dtensor(PyObject* object);

// What a DTensor keeps for this rank, and how it is placed.
py::object local_of(PyObject* dtensor);
py::object spec_of(PyObject* dtensor);

// The stream that torch is working on just now, on this device.
void* current_stream(const DLDevice& device);

inline bool is_plain(PyObject* object) {
  // Subclasses and wrappers may keep their data elsewhere, and the exchange API doesn't say: exact types only.
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

// Asks for what reading the tensors soon after items[i] will touch: their objects, torch's parts, and their storages
// or, of parameters whose gradients are wanted, autograd's parts; each some items later than the next, to which it
// leads. After a backward pass none of it is in the cache: a list of 1,000 small gradients then takes a fifth less
// time, and the 10,000 tensors of an optimizer's 2,000 parameters are read in half of it (EPYC, Zen 4).
FUSEDCLIP_INLINE void prefetch_tensors(PyObject* const* items, size_t i, size_t n, bool for_gradients) {
  constexpr size_t kStep = 12;
  if (i + 3 * kStep >= n || !torch.storage) return;
  const auto part_of = [](PyObject* object) -> void** {
    return is_plain(object) ? static_cast<void***>(static_cast<void*>(object))[torch.part] : nullptr;
  };
  if (void** const part = part_of(items[i + kStep])) {
    const char* const next = static_cast<const char*>(part[torch.storage + for_gradients]);
    __builtin_prefetch(next);
    if (!for_gradients) __builtin_prefetch(next + 64);
  }
  const char* const part = reinterpret_cast<const char*>(part_of(items[i + 2 * kStep]));
  for (int line = 0; line < 3; ++line) __builtin_prefetch(part + 64 * line);
  __builtin_prefetch(items[i + 3 * kStep]);
}

// The pending exception only means that this gradient needs a closer look; any other (an interrupt, say) goes on.
inline void forgive(PyObject* kind) {
  if (!PyErr_ExceptionMatches(kind)) throw py::error_already_set();
  PyErr_Clear();
}

inline std::optional<DType> dtype_of(DLDataType type) {
  if (type.lanes != 1) return std::nullopt;
#define FUSEDCLIP_IF_TYPE(name, of_torch, element, dlpack) \
  if (type.code == dlpack && type.bits == 8 * sizeof(element)) return DType::name;
  FUSEDCLIP_DTYPES(FUSEDCLIP_IF_TYPE)
#undef FUSEDCLIP_IF_TYPE
  return std::nullopt;
}

inline int64_t count_of(const DLTensor& t) {
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
bool is_dense(const DLTensor& t);

// A tensor of an exact type, as DLPack has it.
FUSEDCLIP_INLINE bool read_tensor(PyObject* tensor, DLTensor& t) {
  if (torch.dlpack->dltensor_from_py_object_no_sync(tensor, &t) == 0) return true;
  return forgive(PyExc_Exception), false;
}

FUSEDCLIP_INLINE bool is_flat(const DLTensor& t, int64_t count) {
  return count == 0 || (t.data && (is_contiguous(t) || is_dense(t)));
}

inline void* start_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// Its flat memory, or nothing if it is not plain.
inline std::optional<Segment> segment_of(const DLTensor& t) {
  const std::optional<DType> dtype = dtype_of(t.dtype);
  const int64_t count = count_of(t);
  if (!dtype || !is_flat(t, count)) return std::nullopt;
  return Segment{start_of(t), count, *dtype};
}

inline bool is_same(const DLDevice& a, const DLDevice& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

// The memory of a contiguous tensor on this device; null for None. For scalars and results, not for gradients.
double* doubles_of(py::handle tensor, const DLDevice& device);
const float* flag_of(py::handle tensor, const DLDevice& device);

// Where a norm is to be stored: one float or double.
struct NormPlace {
  void* address;
  bool is_double;
};
NormPlace norm_place_of(py::handle tensor, const DLDevice& device);

}  // namespace fusedclip
