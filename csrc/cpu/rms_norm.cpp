// RMSNorm, with the residual addition fused: the CPU twin of csrc/rms_norm.cu. Definitions and shapes are in ops.h.
//
// Memory traffic per element: forward reads x (and residual) and writes y (and h); backward reads grad_y, x (and
// grad_h) and writes grad_x. A row is walked twice, the second time out of the cache, with the next one on its way.
// Backward takes four rows at a time, so that gamma and the partial gamma gradient pass through the cache once for the
// four.
#include "parallel.h"
#include "prefetch.h"
#include "streaming.h"

namespace k2::cpu::K2_ISA {
namespace {

// A sum over [0, length) that add(i, lanes, to) gathers into `to`: four running sums, closed every kSumBlock elements,
// which keeps the error of long rows near that of a pairwise sum. T: as in for_steps_of.
constexpr int64_t kSumBlock = 2048;

template <class T, class Add>
float blocked_sum(int64_t length, Add&& add) {
  Vec total = splat(0.0f);
  for (int64_t begin = 0; begin < length; begin += kSumBlock) {
    const int64_t end = length - begin < kSumBlock ? length : begin + kSumBlock;
    Vec2 first = splat(0.0f), second = splat(0.0f);
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      if constexpr (sizeof(T) < sizeof(float)) {
        add(i, Twice{}, first);
        add(i + 2 * kLanes, Twice{}, second);
      } else {
        add(i, Full{}, first.one);
        add(i + kLanes, Full{}, first.other);
        add(i + 2 * kLanes, Full{}, second.one);
        add(i + 3 * kLanes, Full{}, second.other);
      }
    }
    for_lanes(end - i, [&](int64_t rest, auto lanes) { add(i + rest, lanes, first.one); });
    total = total + ((first.one + first.other) + (second.one + second.other));
  }
  return sum(total);
}

// y = h * rstd * w for one row; h = x, or x + residual rounded and stored.
template <bool kResidual, bool kStreaming, class T, class Gamma>
float normalize_row(const T* x, const T* residual, const Gamma* gamma, T* h, T* y, int64_t hidden, float epsilon,
                    float offset) {
  const float squares = blocked_sum<T>(hidden, [&](int64_t i, auto lanes, auto& to) {
    auto value = load(x + i, lanes);
    if constexpr (kResidual) {
      store(h + i, value + load(residual + i, lanes), lanes);
      value = load(h + i, lanes);
    }
    to = fma(value, value, to);
  });
  const double mean_square = static_cast<double>(squares) / static_cast<double>(hidden);
  const float rstd = static_cast<float>(1.0 / __builtin_sqrt(mean_square + static_cast<double>(epsilon)));
  const T* normalized = kResidual ? h : x;
  for_steps_of<T>(hidden, [&](int64_t column, auto lanes) {
    prefetch_row(x + column, hidden, lanes);
    if constexpr (kResidual) prefetch_row(residual + column, hidden, lanes);
    const auto weight = load_beside<T>(gamma + column, lanes) + splat(offset);
    put<kStreaming>(y + column, load(normalized + column, lanes) * splat(rstd) * weight, lanes);
  });
  return rstd;
}

template <class T, class Gamma>
void forward(const T* x, const T* residual, const Gamma* gamma, T* h, T* y, float* rstd, int64_t rows, int64_t hidden,
             float epsilon, float offset, int threads) {
  const int64_t bytes = rows * hidden * static_cast<int64_t>(sizeof(T)) * (residual ? 4 : 2);
  with_truth(residual != nullptr, [&](auto has_residual) {
    with_truth(worth_streaming(y, rows, hidden), [&](auto streaming) {
      parallel_ranges(rows, bytes, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          const int64_t at = row * hidden;
          const T* residual_row = has_residual.value ? residual + at : nullptr;
          T* h_row = has_residual.value ? h + at : nullptr;
          rstd[row] = normalize_row<has_residual.value, streaming.value>(x + at, residual_row, gamma, h_row, y + at,
                                                                         hidden, epsilon, offset);
        }
      });
    });
  });
}

constexpr int64_t kDotBlock = 1024;  // columns after which a running sum is closed, for the sake of its rounding error

template <class T, class Gamma>
struct Backward {
  const T *grad_y, *grad_h, *x;
  const Gamma* gamma;
  const float* rstd;
  T* grad_x;
  int64_t hidden;
  float offset;

  template <class Lanes>
  auto weight_at(int64_t column, Lanes lanes) const {
    return load_beside<T>(gamma + column, lanes) + splat(offset);
  }

  // kRows consecutive rows: the mean of g * xhat of each, then grad_x, and grad_y * xhat added into partial (fp32 [H],
  // in the order of T).
  template <int kRows, bool kStreaming>
  void rows_at(int64_t row, float* partial) const {
    const int64_t at = row * hidden;
    Vec scale[kRows], mean[kRows];
    for (int r = 0; r < kRows; ++r) scale[r] = splat(rstd[row + r]), mean[r] = splat(0.0f);
    for (int64_t begin = 0; begin < hidden; begin += kDotBlock) {
      Vec2 dot[kRows];
      for (int r = 0; r < kRows; ++r) dot[r] = splat(0.0f);
      for_twice_lanes(hidden - begin < kDotBlock ? hidden - begin : kDotBlock, [&](int64_t within, auto lanes) {
        const auto weight = weight_at(begin + within, lanes);
        for (int r = 0; r < kRows; ++r) {
          const int64_t i = at + r * hidden + begin + within;
          add_product(dot[r], load(grad_y + i, lanes) * weight, load(x + i, lanes) * scale[r]);
        }
      });
      for (int r = 0; r < kRows; ++r) mean[r] = mean[r] + (dot[r].one + dot[r].other);
    }
    for (int r = 0; r < kRows; ++r) mean[r] = splat(sum(mean[r]) / static_cast<float>(hidden));

    for_twice_lanes(hidden, [&](int64_t column, auto lanes) {
      using V = decltype(weight_at(column, lanes));
      const V weight = weight_at(column, lanes);
      V grad_gamma = partial ? load(partial + column, lanes) : V{splat(0.0f)}, result[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = at + r * hidden + column;
        prefetch_row(grad_y + i, kRows * hidden, lanes);
        prefetch_row(x + i, kRows * hidden, lanes);
        const V grad = load(grad_y + i, lanes), normalized = load(x + i, lanes) * scale[r];
        grad_gamma = fma(grad, normalized, grad_gamma);
        result[r] = fms(grad, weight, normalized * mean[r]) * scale[r];
        if (grad_h) {
          prefetch_row(grad_h + i, kRows * hidden, lanes);
          result[r] = result[r] + load(grad_h + i, lanes);
        }
      }
      if (partial) store(partial + column, grad_gamma, lanes);
      // All loads first: rows lie a multiple of 4 KiB apart, and a load waits for a store at its address modulo that.
      for (int r = 0; r < kRows; ++r) put<kStreaming>(grad_x + at + r * hidden + column, result[r], lanes);
    });
  }

  template <bool kStreaming>
  void rows_between(int64_t first, int64_t last, float* partial) const {
    // Four rows of grad_y and x wait in the second-level cache between the two walks: 512 KiB at most.
    const bool four_fit = hidden * static_cast<int64_t>(sizeof(T)) <= 64 << 10;
    int64_t row = first;
    if (four_fit)
      for (; row + 4 <= last; row += 4) rows_at<4, kStreaming>(row, partial);
    for (; row < last; ++row) rows_at<1, kStreaming>(row, partial);
  }
};

// grad_gamma = the partial sums [partial_rows, H], added in order.
template <class T, class Gamma>
void add_partial_rows(const float* workspace, Gamma* grad_gamma, int64_t partial_rows, int64_t hidden, int threads) {
  constexpr int64_t kColumns = 256;  // whole steps of rows_at, which orders them
  const int64_t pieces = (hidden + kColumns - 1) / kColumns;
  parallel_ranges(pieces, partial_rows * hidden * 4, threads, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns, end = last * kColumns < hidden ? last * kColumns : hidden;
    for_twice_lanes(end - begin, [&](int64_t i, auto lanes) {
      auto total = load(workspace + begin + i, lanes);
      for (int64_t part = 1; part < partial_rows; ++part)
        total = total + load(workspace + part * hidden + begin + i, lanes);
      store_beside<T>(grad_gamma + begin + i, total, lanes);
    });
  });
}

template <class T, class Gamma>
void backward(const Backward<T, Gamma>& op, Gamma* grad_gamma, float* workspace, int64_t partial_rows, int64_t rows,
              int threads) {
  const int64_t row_bytes = op.hidden * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = rows * row_bytes * (op.grad_h ? 4 : 3);
  const bool in_place = op.grad_x == op.grad_y || op.grad_x == op.grad_h;
  with_truth(!in_place && worth_streaming(op.grad_x, rows, op.hidden), [&](auto streaming) {
    parallel_ranges(partial_rows, bytes, threads, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        float* partial = grad_gamma ? workspace + part * op.hidden : nullptr;
        if (partial) std::memset(partial, 0, sizeof(float) * op.hidden);
        const int64_t begin = rows * part / partial_rows, end = rows * (part + 1) / partial_rows;
        op.template rows_between<streaming.value>(begin, end, partial);
      }
    });
  });
  if (grad_gamma) add_partial_rows<T>(workspace, grad_gamma, partial_rows, op.hidden, threads);
}

// Runs body(T{}, Gamma{}); gamma is fp32 or of the tensors' own type.
template <class Body>
void with_types(DType dtype, DType gamma_dtype, Body&& body) {
  with_type(dtype, [&](auto element) {
    if (gamma_dtype == DType::float32) body(element, float{});
    else body(element, element);
  });
}

}  // namespace

void rms_norm_forward(const void* x, const void* residual, const void* gamma, void* h, void* y, float* rstd,
                      int64_t rows, int64_t hidden, float epsilon, bool zero_centered, DType dtype, DType gamma_dtype,
                      int threads) {
  with_types(dtype, gamma_dtype, [&](auto element, auto gamma_element) {
    using T = decltype(element);
    using Gamma = decltype(gamma_element);
    forward(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const Gamma*>(gamma),
            static_cast<T*>(h), static_cast<T*>(y), rstd, rows, hidden, epsilon, zero_centered ? 1.0f : 0.0f, threads);
  });
}

void rms_norm_backward(const void* grad_y, const void* grad_h, const void* x, const void* gamma, const float* rstd,
                       void* grad_x, void* grad_gamma, float* workspace, int64_t partial_rows, int64_t rows,
                       int64_t hidden, bool zero_centered, DType dtype, DType gamma_dtype, int threads) {
  with_types(dtype, gamma_dtype, [&](auto element, auto gamma_element) {
    using T = decltype(element);
    using Gamma = decltype(gamma_element);
    const Backward<T, Gamma> op{static_cast<const T*>(grad_y), static_cast<const T*>(grad_h), static_cast<const T*>(x),
                                static_cast<const Gamma*>(gamma), rstd, static_cast<T*>(grad_x), hidden,
                                zero_centered ? 1.0f : 0.0f};
    backward(op, static_cast<Gamma*>(grad_gamma), workspace, partial_rows, rows, threads);
  });
}

// One partial sum for 32 rows, 64 at most: enough pieces for the cores there are, and little next to the rows
// themselves.
int64_t rms_norm_partial_rows(int64_t rows, int64_t /*hidden*/) {
  const int64_t wanted = (rows + 31) / 32;
  return wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
}

}  // namespace k2::cpu::K2_ISA
