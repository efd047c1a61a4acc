// SwiGLU on packed [gate | up]: the CPU twin of csrc/swiglu.cu. Definitions and shapes are in ops.h.
//
// Memory traffic per output element: forward 3, backward 5 elements. Backward evaluates the sigmoid once.
#include "exponential.h"
#include "parallel.h"
#include "prefetch.h"
#include "streaming.h"

namespace k2::cpu::K2_ISA {
namespace {

template <class T>
void forward(const T* packed, T* out, int64_t rows, int64_t columns, int threads) {
  const int64_t bytes = 3 * rows * columns * static_cast<int64_t>(sizeof(T));
  with_truth(worth_streaming(out, rows, columns), [&](auto streaming) {
    parallel_ranges(rows, bytes, threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T *gates = packed + 2 * row * columns, *ups = gates + columns;
        T* to = out + row * columns;
        for_twice_lanes(columns, [&](int64_t i, auto lanes) {
          prefetch_stream(gates + i, lanes);
          prefetch_stream(ups + i, lanes);
          const auto gate = load(gates + i, lanes), up = load(ups + i, lanes);
          put<streaming.value>(to + i, gate / one_plus_exp_minus<T>(gate) * up, lanes);
        });
      }
    });
  });
}

// With s = sigmoid(gate): d out / d up = gate * s,  d out / d gate = up * s * (1 + gate * (1 - s)).
template <class T>
void backward(const T* grad_out, const T* packed, T* grad_packed, int64_t rows, int64_t columns, int threads) {
  const int64_t bytes = 5 * rows * columns * static_cast<int64_t>(sizeof(T));
  const bool in_place = grad_packed == packed;
  with_truth(!in_place && worth_streaming(grad_packed, rows, columns), [&](auto streaming) {
    parallel_ranges(rows, bytes, threads, [&](int64_t first, int64_t last) {
      const Vec one = splat(1.0f);
      for (int64_t row = first; row < last; ++row) {
        const T *gates = packed + 2 * row * columns, *ups = gates + columns, *grads = grad_out + row * columns;
        T *grad_gates = grad_packed + 2 * row * columns, *grad_ups = grad_gates + columns;
        for_twice_lanes(columns, [&](int64_t i, auto lanes) {
          prefetch_stream(gates + i, lanes);
          prefetch_stream(ups + i, lanes);
          prefetch_stream(grads + i, lanes);
          using V = decltype(load(gates + i, lanes));
          const V gate = load(gates + i, lanes), up = load(ups + i, lanes), grad = load(grads + i, lanes);
          const V s = V{one} / one_plus_exp_minus<T>(gate), grad_times_s = grad * s;
          put<streaming.value>(grad_gates + i, grad_times_s * up * fma(gate, one - s, V{one}), lanes);
          put<streaming.value>(grad_ups + i, grad_times_s * gate, lanes);
        });
      }
    });
  });
}

}  // namespace

void swiglu_forward(const void* packed, void* out, int64_t rows, int64_t columns, DType dtype, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    forward(static_cast<const T*>(packed), static_cast<T*>(out), rows, columns, threads);
  });
}

void swiglu_backward(const void* grad_out, const void* packed, void* grad_packed, int64_t rows, int64_t columns,
                     DType dtype, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    backward(static_cast<const T*>(grad_out), static_cast<const T*>(packed), static_cast<T*>(grad_packed), rows,
             columns, threads);
  });
}

}  // namespace k2::cpu::K2_ISA
