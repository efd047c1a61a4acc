// How a function of ops.h becomes a Python function: pointers and DType arrive as integers, the GIL is released, and a
// status other than 0 is handed to the module's own error report. Arguments go by position, in the order of ops.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "ops.h"

namespace k2 {

// The type that Python passes for a C++ argument type, and the way back.
template <class T>
struct Argument {
  using Passed = T;
  static T convert(T value) { return value; }
};
template <class T>
struct Argument<T*> {
  using Passed = uintptr_t;
  static T* convert(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <>
struct Argument<DType> {
  using Passed = int32_t;
  static DType convert(int32_t code) { return static_cast<DType>(code); }
};

// An operation; the CPU's cannot fail.
template <class... Parameters>
void bind(pybind11::module_& module, const char* name, void (*function)(Parameters...)) {
  auto call = [function](typename Argument<Parameters>::Passed... values) {
    function(Argument<Parameters>::convert(values)...);
  };
  module.def(name, call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

// An operation that returns a CUDA status: report(name, status) throws where it is not 0.
void report(const char* name, int status);

template <class... Parameters>
void bind(pybind11::module_& module, const char* name, int (*function)(Parameters...)) {
  module.def(name, [function, name](typename Argument<Parameters>::Passed... values) {
    int status;
    {
      pybind11::gil_scoped_release released;
      status = function(Argument<Parameters>::convert(values)...);
    }
    if (status != 0) report(name, status);
  });
}

// A size that Python asks for before it allocates a workspace.
template <class... Parameters>
void bind(pybind11::module_& module, const char* name, int64_t (*function)(Parameters...)) {
  module.def(name, [function](typename Argument<Parameters>::Passed... values) {
    return function(Argument<Parameters>::convert(values)...);
  });
}

}  // namespace k2

// The table of contents: of the CPU's module alone, and of both.
#define K2_BIND_CPU(BIND) BIND(fingerprint) BIND(json_texts) BIND(narrow_ids) BIND(unpack_block)
#define K2_BIND_ALL(BIND)         \
  BIND(rms_norm_forward)          \
  BIND(rms_norm_backward)         \
  BIND(rms_norm_partial_rows)     \
  BIND(rotary)                    \
  BIND(swiglu_forward)            \
  BIND(swiglu_backward)           \
  BIND(cross_entropy_statistics)  \
  BIND(cross_entropy_loss)        \
  BIND(cross_entropy_gradient)    \
  BIND(adamw)                     \
  BIND(squared_norm)              \
  BIND(squared_norm_workspace)    \
  BIND(scale)
