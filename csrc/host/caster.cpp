#include "host/caster.h"

#include <sstream>
#include <stdexcept>

#include "host/dlpack.h"
#include "host/interpreter.h"

namespace ei {
namespace {

const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    throw pybind11::type_error(std::string("expected a tensor, got ") + type->tp_name);
  }
  auto* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // the type keeps the table alive
  if (!api) {
    PyErr_Clear();
    throw pybind11::type_error("the tensor's DLPack exchange capsule has an unknown name");
  }
  while (api && api->header.version.major > 1)
    api = reinterpret_cast<const DLPackExchangeAPI*>(api->header.prev_api);
  if (!api || api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync)
    throw pybind11::type_error("the tensor's framework does not offer DLPack exchange version 1");
  return api;
}

DType dtype_of(DLDataType t) {
  if (t.lanes != 1) return DType::other;
  if (t.code == kDLFloat && t.bits == 32) return DType::f32;
  if (t.code == kDLBfloat && t.bits == 16) return DType::bf16;
  if (t.code == kDLFloat && t.bits == 16) return DType::f16;
  if (t.code == kDLInt && t.bits == 32) return DType::i32;
  if (t.code == kDLInt && t.bits == 64) return DType::i64;
  if (t.code == kDLUInt && t.bits == 8) return DType::u8;
  if (t.code == kDLFloat && t.bits == 64) return DType::f64;
  if (t.code == kDLInt && t.bits == 8) return DType::i8;
  if (t.code == kDLInt && t.bits == 16) return DType::i16;
  if (t.code == kDLBool && t.bits == 8) return DType::boolean;
  if (t.code == kDLComplex && t.bits == 64) return DType::complex64;
  if (t.code == kDLComplex && t.bits == 128) return DType::complex128;
  return DType::other;
}

// The Python exception that a failed exchange left behind, without the traces that follow its text.
std::string pending_error() {
  if (!PyErr_Occurred()) return "no reason given";
  const std::string text = pybind11::error_already_set().what();
  return text.substr(0, text.find('\n'));
}

// Whether the memory holds the negative of what the tensor means (torch's lazy negation, as in
// x.conj().imag): the exchange does not tell. Frameworks without such views have no is_neg.
bool holds_negative(PyObject* object) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* answer;
  {
    const Foreign torch;  // gives the lock back while it looks
    answer = PyObject_CallMethodNoArgs(object, name);
  }
  if (!answer) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw pybind11::error_already_set();
    PyErr_Clear();
    return false;
  }
  Py_DECREF(answer);
  return answer == Py_True;
}

}  // namespace

void tensor_from_python(PyObject* object, TensorArg& out) {
  // The table belongs to the type; one type (torch.Tensor) is nearly all there is to see.
  static PyTypeObject* last_type = nullptr;
  static const DLPackExchangeAPI* last_api = nullptr;
  PyTypeObject* type = Py_TYPE(object);
  if (type != last_type) {
    last_api = exchange_api(type);
    Py_INCREF(type);  // so that no later type takes its address
    Py_XDECREF(last_type);
    last_type = type;
  }
  DLTensor t;
  if (last_api->dltensor_from_py_object_no_sync(object, &t) != 0)
    throw pybind11::type_error("tensor refused by its framework: " + pending_error());
  if (t.ndim > kMaxDims)
    throw pybind11::type_error("expected a tensor of at most 6 dimensions, got " +
                               std::to_string(t.ndim));
  if (holds_negative(object))
    throw pybind11::type_error(
        "expected plain memory, got a negated view: resolve_neg() copies it");
  const bool cuda = t.device.device_type == kDLCUDA || t.device.device_type == kDLCUDAManaged;
  if (!cuda && t.device.device_type != kDLCPU && t.device.device_type != kDLCUDAHost)
    throw pybind11::type_error("expected a tensor on the CPU or a CUDA device, got device type " +
                               std::to_string(t.device.device_type));
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  out.dtype = dtype_of(t.dtype);
  out.ndim = t.ndim;
  int64_t dense = 1;
  bool sized = true;
  for (int i = t.ndim - 1; i >= 0; --i) {
    out.shape[i] = t.shape[i];
    out.stride[i] = t.strides ? t.strides[i] : dense;
    sized = sized && t.shape[i] >= 0 && !__builtin_mul_overflow(dense, t.shape[i], &dense);
  }
  out.cuda = cuda;
  out.device_id = t.device.device_id;
  out.given = true;
  out.object = object;
  out.source = last_api;
  if (!sized)
    throw pybind11::type_error("expected sizes >= 0 of fewer than 2**63 elements, got " +
                               out.describe());
  if (dense > 0 && !t.data)
    throw pybind11::type_error("expected a tensor with memory, got " + out.describe() +
                               " whose storage was given back");
  if (dense > 0 && reinterpret_cast<uintptr_t>(out.data) % dtype_size(out.dtype) != 0)
    throw pybind11::type_error("expected tensor memory aligned to its dtype");
}

void* current_stream(const DLPackExchangeAPI* source, int device_id) {
  void* stream = nullptr;
  if (source->current_work_stream(kDLCUDA, device_id, &stream) != 0)
    throw std::runtime_error("no current stream from the tensor's framework: " + pending_error());
  return stream;
}

std::string Tensor::describe() const {
  if (!given) return "None";
  std::ostringstream s;
  s << dtype_name(dtype) << "[";
  for (int i = 0; i < ndim; ++i) s << (i ? ", " : "") << shape[i];
  s << "] on " << (cuda ? "cuda:" + std::to_string(device_id) : std::string("cpu"));
  return s.str();
}

}  // namespace ei
