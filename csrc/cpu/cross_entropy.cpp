// Vocab-parallel cross-entropy: the CPU twin of csrc/cross_entropy.cu. Definitions and shapes are in ops.h.
//
// Statistics read each logit once and take one exponential of it, of its distance from a guess at the row's maximum:
// that of the first columns. A block that exceeds the guess by so much that the distances lose digits makes its own
// maximum the new guess, and is walked again. The gradient reads and writes each logit once.
#include "exponential.h"
#include "parallel.h"
#include "prefetch.h"
#include "streaming.h"

namespace k2::cpu::K2_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // columns after which running sums are closed, for the sake of their rounding error
constexpr int64_t kGuess = 64;    // columns whose maximum is taken for the row's at first
constexpr float kHeadroom = 8.0f;  // a logit minus the guess is rounded: off by up to 2 units of e^x where x is 8
constexpr float kInfinity = __builtin_inff();

float exp(float x) {
  float lane[kLanes];
  store(lane, exp(splat(x)), Full{});
  return lane[0];
}

template <class T>
float value_at(const T* p) {
  float lane[kLanes];
  store(lane, load(p, Part{1}), Full{});
  return lane[0];
}

struct Statistics {
  float maximum, exp_sum, sum;
};

// What a vector of columns gathers: the maximum, which passes over NaN, the sum of exp(logit - shift), which carries
// it, and the sum of the logits.
struct Gathered {
  Vec largest = splat(-kInfinity), exp_sum = splat(0.0f), sum = splat(0.0f);

  template <bool kSum, class Lanes>
  void add(Vec logit, Vec shift, Lanes lanes) {
    if constexpr (kSum) sum = sum + logit;
    if constexpr (!Lanes::kWhole) logit = choose(lanes, logit, splat(-kInfinity));
    largest = max(logit, largest);
    exp_sum = exp_sum + exp_for_sum(logit - shift);
  }
};

template <bool kSum, class T>
Gathered gather(const T* block, int64_t length, float at) {
  const Vec shift = splat(at > -kInfinity ? at : 0.0f);
  Gathered one, other;
  for_twice_lanes(length, [&](int64_t i, auto lanes) {
    prefetch_stream(block + i, lanes);
    if constexpr (std::is_same_v<decltype(lanes), Twice>) {
      const Vec2 logits = load(block + i, lanes);
      one.add<kSum>(logits.one, shift, Full{});
      other.add<kSum>(logits.other, shift, Full{});
    } else {
      one.add<kSum>(load(block + i, lanes), shift, lanes);
    }
  });
  return {max(one.largest, other.largest), one.exp_sum + other.exp_sum, one.sum + other.sum};
}

template <class T>
float maximum_of(const T* row, int64_t columns) {
  Vec largest = splat(-kInfinity);
  for_lanes(columns, [&](int64_t i, auto lanes) {
    largest = max(choose(lanes, load(row + i, lanes), splat(-kInfinity)), largest);
  });
  return max(largest);
}

// Over [0, columns) of one row.
template <bool kSum, class T>
Statistics row_statistics(const T* row, int64_t columns) {
  float maximum = -kInfinity, shift = maximum_of(row, columns < kGuess ? columns : kGuess);
  Vec exp_sum = splat(0.0f), sum_of_logits = splat(0.0f);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t length = columns - begin < kBlock ? columns - begin : kBlock;
    Gathered found = gather<kSum>(row + begin, length, shift);
    const float largest = max(found.largest);
    if (largest > shift + kHeadroom) {
      exp_sum = exp_sum * splat(exp(shift - largest));
      shift = largest;
      found = gather<kSum>(row + begin, length, shift);
    }
    maximum = largest > maximum ? largest : maximum;
    exp_sum = exp_sum + found.exp_sum;
    if constexpr (kSum) sum_of_logits = sum_of_logits + found.sum;
  }
  const float of_maximum = maximum > shift ? sum(exp_sum) * exp(shift - maximum) : sum(exp_sum);
  return {maximum, of_maximum, kSum ? sum(sum_of_logits) : 0.0f};
}

template <class T>
void statistics_of_rows(const T* logits, int64_t stride, const int64_t* labels, float* statistics, bool with_sum,
                        int64_t rows, int64_t columns, int64_t vocabulary_start, int threads) {
  const int64_t bytes = rows * columns * static_cast<int64_t>(sizeof(T));
  with_truth(with_sum, [&](auto sums) {
    parallel_ranges(rows, bytes, threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T* values = logits + row * stride;
        const Statistics found = row_statistics<sums.value>(values, columns);
        const int64_t target = labels[row] - vocabulary_start;
        statistics[row] = found.maximum;
        statistics[rows + row] = found.exp_sum;
        statistics[2 * rows + row] = target >= 0 && target < columns ? value_at(values + target) : 0.0f;
        if constexpr (sums.value) statistics[3 * rows + row] = found.sum;
      }
    });
  });
}

// What all rows of a loss have in common.
struct Terms {
  int64_t vocabulary_size, ignore_index;
  float label_smoothing, z_loss;

  bool out_of_range(int64_t label) const { return label < 0 || label >= vocabulary_size; }
};

// One row of logits to its gradient, in place or not.
template <bool kStreaming, class T>
void row_gradient(const T* logits, T* gradient, int64_t columns, int64_t target, float lse, float grad_loss,
                  const Terms& terms) {
  const float uniform = terms.label_smoothing / static_cast<float>(terms.vocabulary_size);
  const float softmax_factor = 1.0f + 2.0f * terms.z_loss * lse;
  const bool owned = target >= 0 && target < columns;
  float at_target = 0.0f;  // read before the loop may overwrite it
  if (owned) {
    const float probability = exp(value_at(logits + target) - lse);
    at_target = grad_loss * (probability * softmax_factor - uniform - (1.0f - terms.label_smoothing));
  }
  const Vec shift = splat(lse), factor = splat(grad_loss * softmax_factor), constant = splat(-grad_loss * uniform);
  for_twice_lanes(columns, [&](int64_t i, auto lanes) {
    prefetch_stream(logits + i, lanes);
    put<kStreaming>(gradient + i, fma(exp_for<T>(load(logits + i, lanes) - shift), factor, constant), lanes);
  });
  if (owned) {
    fence();
    store(gradient + target, splat(at_target), Part{1});
  }
}

template <class T>
struct GradientRows {
  const T* logits;
  int64_t logits_stride;
  const int64_t* labels;
  const float *lse, *grad_loss;
  int64_t grad_loss_stride;
  T* gradient;
  int64_t gradient_stride, rows, columns, vocabulary_start;
};

template <class T>
void gradient_of_rows(const GradientRows<T>& op, const Terms& terms, int threads) {
  const int64_t bytes = 2 * op.rows * op.columns * static_cast<int64_t>(sizeof(T));
  const bool aligned = op.gradient_stride * sizeof(T) % 64 == 0;
  const bool streaming_pays = aligned && op.gradient != op.logits && worth_streaming(op.gradient, op.rows, op.columns);
  with_truth(streaming_pays, [&](auto streaming) {
    parallel_ranges(op.rows, bytes, threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        T* to = op.gradient + row * op.gradient_stride;
        const int64_t label = op.labels[row];
        float grad_loss = op.grad_loss[row * op.grad_loss_stride];
        if (label == terms.ignore_index || grad_loss == 0.0f) {
          std::memset(static_cast<void*>(to), 0, sizeof(T) * op.columns);
          continue;
        }
        if (terms.out_of_range(label)) grad_loss = __builtin_nanf("");
        row_gradient<streaming.value>(op.logits + row * op.logits_stride, to, op.columns, label - op.vocabulary_start,
                                      op.lse[row], grad_loss, terms);
      }
    });
  });
}

}  // namespace

void cross_entropy_statistics(const void* logits, int64_t logits_stride, const int64_t* labels, float* statistics,
                              int64_t planes, int64_t rows, int64_t columns, int64_t vocabulary_start, DType dtype,
                              int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    statistics_of_rows(static_cast<const T*>(logits), logits_stride, labels, statistics, planes == 4, rows, columns,
                       vocabulary_start, threads);
  });
  if (rows > 0) statistics[planes * rows] = static_cast<float>(columns);
}

void cross_entropy_loss(const float* all_statistics, int64_t ranks, int64_t planes, const int64_t* labels, float* loss,
                        float* lse, int64_t rows, int64_t vocabulary_size, float label_smoothing, float z_loss,
                        int64_t ignore_index, int threads) {
  const Terms terms{vocabulary_size, ignore_index, planes == 4 ? label_smoothing : 0.0f, z_loss};
  const int64_t of_rank = planes * rows + 1;
  bool equal_widths = true;
  for (int64_t rank = 1; rank < ranks; ++rank)
    equal_widths = equal_widths && all_statistics[rank * of_rank + planes * rows] == all_statistics[planes * rows];
  parallel_ranges(rows, ranks * planes * rows * 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      auto at = [&](int64_t rank, int64_t plane) { return all_statistics[rank * of_rank + plane * rows + row]; };
      float maximum = -kInfinity, exp_sum = 0.0f, target = 0.0f, sum_of_logits = 0.0f;
      for (int64_t rank = 0; rank < ranks; ++rank) maximum = at(rank, 0) > maximum ? at(rank, 0) : maximum;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        exp_sum += at(rank, 0) == maximum ? at(rank, 1) : at(rank, 1) * exp(at(rank, 0) - maximum);
        target += at(rank, 2);
        if (planes == 4) sum_of_logits += at(rank, 3);
      }
      const float log_sum = maximum + __builtin_logf(exp_sum);
      float value = log_sum - (1.0f - terms.label_smoothing) * target + terms.z_loss * log_sum * log_sum;
      if (terms.label_smoothing != 0.0f)
        value -= terms.label_smoothing * (sum_of_logits / static_cast<float>(vocabulary_size));
      if (terms.out_of_range(labels[row]) || !equal_widths) value = __builtin_nanf("");
      loss[row] = labels[row] == ignore_index ? 0.0f : value;
      lse[row] = log_sum;
    }
  });
}

void cross_entropy_gradient(const void* logits, int64_t logits_stride, const int64_t* labels, const float* lse,
                            const float* grad_loss, int64_t grad_loss_stride, void* gradient, int64_t gradient_stride,
                            int64_t rows, int64_t columns, int64_t vocabulary_start, int64_t vocabulary_size,
                            float label_smoothing, float z_loss, int64_t ignore_index, DType dtype, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const GradientRows<T> op{static_cast<const T*>(logits), logits_stride, labels, lse, grad_loss, grad_loss_stride,
                             static_cast<T*>(gradient), gradient_stride, rows, columns, vocabulary_start};
    gradient_of_rows(op, Terms{vocabulary_size, ignore_index, label_smoothing, z_loss}, threads);
  });
}

}  // namespace k2::cpu::K2_ISA
