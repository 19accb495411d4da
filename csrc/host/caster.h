// pybind11 conversion from any Python tensor that offers the DLPack C exchange API to ei::Tensor.
// Shape and strides are copied while the interpreter lock is held; the object itself is kept alive
// by the caller (pybind11 for the call, Step for a recorded one). Every failure is a TypeError.
#pragma once
#include <pybind11/pybind11.h>

#include "host/tensor.h"

namespace ei {

struct DLPackExchangeAPI;

// A tensor argument together with the Python object that owns its memory.
struct TensorArg : Tensor {
  PyObject* object = nullptr;                 // borrowed
  const DLPackExchangeAPI* source = nullptr;  // of the framework it belongs to
};

// Fills `out` from `object`; throws pybind11::type_error that names what is wrong.
void tensor_from_python(PyObject* object, TensorArg& out);

// The stream that the tensor's framework gives work to now, on the tensor's device (CUDA only).
void* current_stream(const DLPackExchangeAPI* source, int device_id);
}  // namespace ei

namespace pybind11::detail {
template <>
struct type_caster<ei::TensorArg> {
  PYBIND11_TYPE_CASTER(ei::TensorArg, const_name("Tensor"));
  bool load(handle source, bool) {
    if (source.is_none()) {
      value = ei::TensorArg{};  // an optional argument: the op's own check refuses it if required
      return true;
    }
    ei::tensor_from_python(source.ptr(), value);
    return true;
  }
};
}  // namespace pybind11::detail
