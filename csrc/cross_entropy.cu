// Cross-entropy over a vocabulary that is cut across ranks, in three calls round one all-gather (equations: ops.h).
//
//   statistics   one pass over this shard's logits: maximum, sum of exponentials, the label's logit, sum of logits
//   loss         the ranks' statistics merged in rank order: every rank computes the same bits
//   gradient     one more pass, in place into the logits
//
// Bytes per bf16 logit: 2 for the statistics, 4 for the gradient, the least possible.
// Rows need no alignment: K2's shard is 4004 columns wide, 8008 bytes, so every other row starts in the middle of 16
// bytes. Each row is split into a few leading elements up to the first 16-byte boundary, vectors, and a few at the end;
// at 4004 columns a thread of 128 has its four vectors of the row on their way at once.
// One exponential a logit: a thread first takes the maximum of the vectors that it holds, and rescales its sum once for
// all of them. The order of that sum follows the address of the row modulo 16: the same buffer gives the same bits, a
// copy of it at another alignment may differ in the last.
#include "primitives.cuh"

namespace k2::cuda {
namespace {

constexpr int vectors_per_thread = 4;
constexpr int most_threads = 512;
constexpr int loss_threads = 128;
constexpr float infinity = __builtin_huge_valf();

// A row as [head | vectors | tail]; elements of the head and the tail are counted through as "edge" elements.
template <class T>
struct RowParts {
  int head, vectors, edges;

  __device__ __forceinline__ RowParts(const T* row, int columns) {
    const int to_boundary = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    head = to_boundary < columns ? to_boundary : columns;
    vectors = (columns - head) / Packed<T>::count;
    edges = columns - vectors * Packed<T>::count;
  }
  __device__ __forceinline__ void make_all_edges(int columns) { head = edges = columns, vectors = 0; }
  __device__ __forceinline__ int vector_column(int vector) const { return head + vector * Packed<T>::count; }
  __device__ __forceinline__ int edge_column(int edge) const {
    return edge < head ? edge : edge + vectors * Packed<T>::count;
  }
};

// Sum of exp(x - maximum) beside its maximum. The maximum is subtracted before the scaling by log2 e: exact for logits
// near it, whatever their size. Of -inf nothing can be subtracted; then every term is exp(-inf) = 0.
template <class T>
struct Exponentials {
  float maximum = -infinity, sum = 0.0f;

  __device__ __forceinline__ static float shift(float maximum) { return maximum == -infinity ? 0.0f : maximum; }
  __device__ __forceinline__ void raise(float new_maximum) {
    sum *= exponential<T>(maximum - shift(new_maximum));
    maximum = new_maximum;
  }
};

// All lanes get the merged value. Lanes are brought to one maximum first, so that sums are only added.
template <class T>
__device__ __forceinline__ Exponentials<T> merge_in_warp(Exponentials<T> mine) {
  mine.raise(warp_reduce(mine.maximum, Maximum{}));
  mine.sum = warp_reduce(mine.sum, Sum{});
  return mine;
}

template <class T>
__global__ void __launch_bounds__(most_threads)
    statistics_kernel(const T* logits, int64_t stride, const int64_t* labels, float* statistics, int planes,
                      int64_t rows, int columns, int64_t vocabulary_start) {
  constexpr int width = Packed<T>::count;
  K2_SHARED(float, maxima, warp_threads);
  K2_SHARED(float, sums, warp_threads);
  K2_SHARED(float, logit_sums, warp_threads);
  const T* row = logits + blockIdx.x * stride;
  const RowParts<T> parts(row, columns);
  Exponentials<T> mine;
  float logit_sum = 0.0f;
  for (int start = threadIdx.x; start < parts.vectors; start += vectors_per_thread * blockDim.x) {
    Packed<T> held[vectors_per_thread];
#pragma unroll
    for (int i = 0; i < vectors_per_thread; ++i) {
      const int vector = start + i * blockDim.x;
      if (vector < parts.vectors) held[i] = load_packed(row + parts.vector_column(vector));
    }
    float maximum = mine.maximum;
#pragma unroll
    for (int i = 0; i < vectors_per_thread; ++i) {
      if (static_cast<int>(start + i * blockDim.x) >= parts.vectors) continue;
#pragma unroll
      for (int j = 0; j < width; ++j) maximum = fmaxf(maximum, to_float(held[i].values[j]));
    }
    mine.raise(maximum);
    const float shift = Exponentials<T>::shift(maximum);
#pragma unroll
    for (int i = 0; i < vectors_per_thread; ++i) {
      if (static_cast<int>(start + i * blockDim.x) >= parts.vectors) continue;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float logit = to_float(held[i].values[j]);
        mine.sum += exponential<T>(logit - shift);
        logit_sum += logit;
      }
    }
  }
  for (int edge = threadIdx.x; edge < parts.edges; edge += blockDim.x) {
    const float logit = to_float(row[parts.edge_column(edge)]);
    mine.raise(fmaxf(mine.maximum, logit));
    mine.sum += exponential<T>(logit - Exponentials<T>::shift(mine.maximum));
    logit_sum += logit;
  }

  mine = merge_in_warp(mine);
  logit_sum = warp_reduce(logit_sum, Sum{});
  const int warps = blockDim.x / warp_threads, warp = threadIdx.x / warp_threads, lane = threadIdx.x % warp_threads;
  if (lane == 0) maxima[warp] = mine.maximum, sums[warp] = mine.sum, logit_sums[warp] = logit_sum;
  __syncthreads();
  if (warp != 0) return;
  mine = {lane < warps ? maxima[lane] : -infinity, lane < warps ? sums[lane] : 0.0f};
  mine = merge_in_warp(mine);
  logit_sum = warp_reduce(lane < warps ? logit_sums[lane] : 0.0f, Sum{});
  if (lane != 0) return;
  const int64_t label = labels[blockIdx.x] - vocabulary_start;
  float* out = statistics + blockIdx.x;
  out[0] = mine.maximum;
  out[rows] = mine.sum;
  out[2 * rows] = label >= 0 && label < columns ? to_float(row[label]) : 0.0f;
  if (planes > 3) out[3 * rows] = logit_sum;
  if (blockIdx.x == 0) statistics[planes * rows] = static_cast<float>(columns);
}

__global__ void __launch_bounds__(loss_threads)
    loss_kernel(const float* all_statistics, int64_t ranks, int64_t planes, const int64_t* labels, float* loss,
                float* lse, int64_t rows, int64_t vocabulary_size, float label_smoothing, float z_loss,
                int64_t ignore_index) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * loss_threads + threadIdx.x;
  if (row >= rows) return;
  const auto of_rank = [&](int64_t rank) { return all_statistics + rank * (planes * rows + 1); };
  const auto plane_of = [&](int64_t rank, int plane) { return of_rank(rank)[plane * rows + row]; };
  bool equal_widths = true;
  for (int64_t rank = 1; rank < ranks; ++rank)
    equal_widths = equal_widths && of_rank(rank)[planes * rows] == of_rank(0)[planes * rows];
  float maximum = -infinity, sum = 0.0f, target = 0.0f, logit_sum = 0.0f;
  for (int64_t rank = 0; rank < ranks; ++rank) maximum = fmaxf(maximum, plane_of(rank, 0));
  const float shift = Exponentials<float>::shift(maximum);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    sum += plane_of(rank, 1) * expf(plane_of(rank, 0) - shift);
    target += plane_of(rank, 2);
    if (planes > 3) logit_sum += plane_of(rank, 3);
  }
  const float above_shift = logf(sum), log_sum = shift + above_shift;
  const float smoothing = planes > 3 ? label_smoothing : 0.0f;
  const int64_t label = labels[row];
  // The large numbers first: of logits of 30,000 the loss keeps all its digits.
  float value = above_shift + (shift - (1.0f - smoothing) * target) + z_loss * log_sum * log_sum;
  if (smoothing != 0.0f) value -= smoothing * (logit_sum / static_cast<float>(vocabulary_size));
  if (label < 0 || label >= vocabulary_size || !equal_widths) value = nanf("");
  loss[row] = label == ignore_index ? 0.0f : value;
  lse[row] = log_sum;
}

template <class T>
struct GradientArguments {
  const T* logits;
  int64_t logits_stride;
  const int64_t* labels;
  const float *lse, *grad_loss;
  int64_t grad_loss_stride;
  T* gradient;
  int64_t gradient_stride;
  int columns;
  int64_t vocabulary_start, vocabulary_size;
  float label_smoothing, z_loss;
  int64_t ignore_index;
};

// gradient of one logit = exp(logit - lse) * softmax_factor - everywhere - [its column is the label's] * at_label
template <class T>
struct RowGradient {
  float lse, softmax_factor, everywhere, at_label;
  int64_t label;  // a column of this shard, or outside of it

  __device__ __forceinline__ float at(float logit) const {
    return exponential<T>(logit - lse) * softmax_factor - everywhere;
  }
};

template <class T>
__device__ __forceinline__ Packed<T> gradient_of(const Packed<T>& logits, int first_column, const RowGradient<T>& row) {
  constexpr int width = Packed<T>::count;
  float values[width];
#pragma unroll
  for (int j = 0; j < width; ++j) values[j] = row.at(to_float(logits.values[j]));
  const int64_t offset = row.label - first_column;
  if (offset >= 0 && offset < width) {
#pragma unroll
    for (int j = 0; j < width; ++j)
      if (j == offset) values[j] -= row.at_label;  // before rounding: p - 1 of a sure token keeps its digits
  }
  Packed<T> result;
#pragma unroll
  for (int j = 0; j < width; ++j) result.values[j] = from_float<T>(values[j]);
  return result;
}

template <class T>
__global__ void __launch_bounds__(most_threads) gradient_kernel(GradientArguments<T> a) {
  const int64_t row = blockIdx.x;
  const T* logits = a.logits + row * a.logits_stride;
  T* gradient = a.gradient + row * a.gradient_stride;
  RowParts<T> parts(logits, a.columns);
  if ((reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(gradient)) % 16 != 0)
    parts.make_all_edges(a.columns);
  const int64_t label = a.labels[row];
  float factor = a.grad_loss[row * a.grad_loss_stride];
  const bool is_zero = label == a.ignore_index || factor == 0.0f;
  if (label < 0 || label >= a.vocabulary_size) factor = nanf("");
  const float lse = a.lse[row];
  const RowGradient<T> of_row{lse, factor * (1.0f + 2.0f * a.z_loss * lse),
                           factor * (a.label_smoothing / static_cast<float>(a.vocabulary_size)),
                           factor * (1.0f - a.label_smoothing), label - a.vocabulary_start};

  for (int start = threadIdx.x; start < parts.vectors; start += vectors_per_thread * blockDim.x) {
    Packed<T> held[vectors_per_thread];
#pragma unroll
    for (int i = 0; i < vectors_per_thread; ++i) {
      const int vector = start + i * blockDim.x;
      held[i] = vector < parts.vectors && !is_zero ? load_packed<Cache::streamed>(logits + parts.vector_column(vector))
                                                   : Packed<T>{};
    }
#pragma unroll
    for (int i = 0; i < vectors_per_thread; ++i) {
      const int vector = start + i * blockDim.x, column = parts.vector_column(vector);
      if (vector < parts.vectors)
        store_packed(gradient + column, is_zero ? Packed<T>{} : gradient_of(held[i], column, of_row));
    }
  }
  for (int edge = threadIdx.x; edge < parts.edges; edge += blockDim.x) {
    const int column = parts.edge_column(edge);
    const float value = of_row.at(to_float(logits[column])) - (column == of_row.label ? of_row.at_label : 0.0f);
    gradient[column] = from_float<T>(is_zero ? 0.0f : value);
  }
}

// Threads for a row of `columns`: all of it held at once where that is possible.
template <class T>
dim3 threads_for(int64_t columns) {
  const int threads = whole_warps(divide_up<int64_t>(columns, Packed<T>::count * vectors_per_thread));
  return dim3(threads < most_threads ? threads : most_threads);
}

}  // namespace

int cross_entropy_statistics(const void* logits, int64_t logits_stride, const int64_t* labels, float* statistics,
                             int64_t planes, int64_t rows, int64_t columns, int64_t vocabulary_start, DType dtype,
                             void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(statistics_kernel<T>, rows, threads_for<T>(columns), 0, stream, static_cast<const T*>(logits),
                  logits_stride, labels, statistics, static_cast<int>(planes), rows, static_cast<int>(columns),
                  vocabulary_start);
  });
}

int cross_entropy_loss(const float* all_statistics, int64_t ranks, int64_t planes, const int64_t* labels, float* loss,
                       float* lse, int64_t rows, int64_t vocabulary_size, float label_smoothing, float z_loss,
                       int64_t ignore_index, void* stream) {
  if (rows == 0) return cudaSuccess;
  return launch(loss_kernel, divide_up<int64_t>(rows, loss_threads), dim3(loss_threads), 0, stream,
                all_statistics, ranks, planes, labels, loss, lse, rows, vocabulary_size, label_smoothing, z_loss,
                ignore_index);
}

int cross_entropy_gradient(const void* logits, int64_t logits_stride, const int64_t* labels, const float* lse,
                           const float* grad_loss, int64_t grad_loss_stride, void* gradient, int64_t gradient_stride,
                           int64_t rows, int64_t columns, int64_t vocabulary_start, int64_t vocabulary_size,
                           float label_smoothing, float z_loss, int64_t ignore_index, DType dtype, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GradientArguments<T> a{static_cast<const T*>(logits),
                                 logits_stride,
                                 labels,
                                 lse,
                                 grad_loss,
                                 grad_loss_stride,
                                 static_cast<T*>(gradient),
                                 gradient_stride,
                                 static_cast<int>(columns),
                                 vocabulary_start,
                                 vocabulary_size,
                                 label_smoothing,
                                 z_loss,
                                 ignore_index};
    return launch(gradient_kernel<T>, rows, threads_for<T>(columns), 0, stream, a);
  });
}

}  // namespace k2::cuda
