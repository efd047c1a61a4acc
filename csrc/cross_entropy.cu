// Cross-entropy over a vocabulary that is cut across ranks, in three calls round one all-gather (equations: ops.h).
//
//   statistics   one pass over this shard's logits: maximum, sum of exponentials, the label's logit, sum of logits
//   loss         the ranks' statistics merged in rank order: every rank computes the same bits
//   gradient     one more pass, in place into the logits
//
// Bytes per bf16 logit: 2 for the statistics, 4 for the gradient, the least possible.
// Rows need no alignment: K2's shard is 4004 columns wide, 8008 bytes, so every other row starts in the middle of 16
// bytes. Each row is split into a few leading elements up to the first 16-byte boundary, vectors, and a few at the end;
// at 4004 columns a thread of 64 has its eight vectors of the row on their way at once.
// One exponential a logit: a thread first takes the maximum of the vectors that it holds, two logits an instruction while
// they are packed, and rescales its sum once for all of them. At two bytes a logit instructions could bound the pass: an
// H200's bandwidth leaves time for about 15 a logit. The order of that sum follows the address of the row modulo 16: the
// same buffer gives the same bits, a copy of it at another alignment may differ in the last.
#include "primitives.cuh"

namespace k2::cuda {
namespace {

constexpr int statistics_vectors = 8, gradient_vectors = 4;  // 16-byte vectors that a thread holds at once
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

// The greater logit in each place of two words; of a number and a NaN the number.
template <class T>
__device__ __forceinline__ uint32_t greater(uint32_t one, uint32_t other) {
  using Bits = Word<T>;
  if constexpr (std::is_same_v<T, float>) {
    return Bits::bits_of(fmaxf(Bits::template as<float>(one), Bits::template as<float>(other)));
  } else {
    using Pair = typename Bits::Pair;
    return Bits::bits_of(__hmax2(Bits::template as<Pair>(one), Bits::template as<Pair>(other)));
  }
}

template <class T>
constexpr uint32_t minus_infinities = std::is_same_v<T, float>    ? 0xFF800000u
                                      : std::is_same_v<T, __half> ? 0xFC00FC00u
                                                                  : 0xFF80FF80u;

template <class T, bool WITH_SUM>
__global__ void __launch_bounds__(most_threads)
    statistics_kernel(const T* logits, int64_t stride, const int64_t* labels, float* statistics, int64_t rows,
                      int columns, int64_t vocabulary_start) {
  using Logits = Word<T>;
  K2_SHARED(float, maxima, warp_threads);
  K2_SHARED(float, sums, warp_threads);
  K2_SHARED(float, logit_sums, warp_threads);
  const T* row = logits + blockIdx.x * stride;
  const RowParts<T> parts(row, columns);
  // Asked for before the vectors, needed after them: a block has nothing to hide another wait for memory behind. Of
  // edges there are at most 2 * (width - 1), fewer than threads.
  const int64_t global_label = labels[blockIdx.x];
  const bool has_edge = static_cast<int>(threadIdx.x) < parts.edges;
  const T edge = has_edge ? row[parts.edge_column(threadIdx.x)] : from_float<T>(0.0f);
  Exponentials<T> mine;
  float logit_sum = 0.0f;
  for (int start = threadIdx.x; start < parts.vectors; start += statistics_vectors * blockDim.x) {
    uint32_t held[statistics_vectors][4], greatest[4];
#pragma unroll
    for (int i = 0; i < statistics_vectors; ++i) {
      const int vector = start + i * blockDim.x;
      constexpr uint32_t none = minus_infinities<T>;
      const uint4 words =
          vector < parts.vectors ? load_16_bytes(row + parts.vector_column(vector)) : uint4{none, none, none, none};
      held[i][0] = words.x, held[i][1] = words.y, held[i][2] = words.z, held[i][3] = words.w;
#pragma unroll
      for (int j = 0; j < 4; ++j) greatest[j] = i == 0 ? held[0][j] : greater<T>(greatest[j], held[i][j]);
    }
    float maximum = mine.maximum, logits[Logits::count];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Logits::unpack(greatest[j], logits);
#pragma unroll
      for (const float logit : logits) maximum = fmaxf(maximum, logit);
    }
    mine.raise(maximum);
    const float shift = Exponentials<T>::shift(maximum);
#pragma unroll
    for (int i = 0; i < statistics_vectors; ++i) {
      if (static_cast<int>(start + i * blockDim.x) >= parts.vectors) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Logits::unpack(held[i][j], logits);
#pragma unroll
        for (const float logit : logits) {
          mine.sum += exponential<T>(logit - shift);
          if constexpr (WITH_SUM) logit_sum += logit;
        }
      }
    }
  }
  const int64_t label = global_label - vocabulary_start;  // subtracted up there, it would be waited for up there
  const bool is_owner = threadIdx.x == 0 && label >= 0 && label < columns;
  const T target = is_owner ? row[label] : from_float<T>(0.0f);  // on its way during the merge
  if (has_edge) {
    const float logit = to_float(edge);
    mine.raise(fmaxf(mine.maximum, logit));
    mine.sum += exponential<T>(logit - Exponentials<T>::shift(mine.maximum));
    if constexpr (WITH_SUM) logit_sum += logit;
  }

  mine = merge_in_warp(mine);
  if constexpr (WITH_SUM) logit_sum = warp_reduce(logit_sum, Sum{});
  const int warps = blockDim.x / warp_threads, warp = threadIdx.x / warp_threads, lane = threadIdx.x % warp_threads;
  if (lane == 0) {
    maxima[warp] = mine.maximum, sums[warp] = mine.sum;
    if constexpr (WITH_SUM) logit_sums[warp] = logit_sum;
  }
  __syncthreads();
  if (warp != 0) return;
  mine = {lane < warps ? maxima[lane] : -infinity, lane < warps ? sums[lane] : 0.0f};
  mine = merge_in_warp(mine);
  if constexpr (WITH_SUM) logit_sum = warp_reduce(lane < warps ? logit_sums[lane] : 0.0f, Sum{});
  if (lane != 0) return;
  float* out = statistics + blockIdx.x;
  out[0] = mine.maximum;
  out[rows] = mine.sum;
  out[2 * rows] = to_float(target);
  if constexpr (WITH_SUM) out[3 * rows] = logit_sum;
  if (blockIdx.x == 0) statistics[(WITH_SUM ? 4 : 3) * rows] = static_cast<float>(columns);
}

__global__ void __launch_bounds__(loss_threads)
    loss_kernel(const float* all_statistics, int64_t ranks, int64_t planes, const int64_t* labels, float* loss,
                float* lse, int64_t rows, int64_t vocabulary_size, float label_smoothing, float z_loss,
                int64_t ignore_index) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * loss_threads + threadIdx.x;
  if (row >= rows) return;
  const int64_t label = labels[row];  // on its way with the statistics
  const auto of_rank = [&](int64_t rank) { return all_statistics + rank * (planes * rows + 1); };
  const auto plane_of = [&](int64_t rank, int plane) { return of_rank(rank)[plane * rows + row]; };
  float maximum = -infinity, sum = 0.0f, target = 0.0f, logit_sum = 0.0f;
  bool equal_widths = true;
#pragma unroll 8
  for (int64_t rank = 0; rank < ranks; ++rank) {
    maximum = fmaxf(maximum, plane_of(rank, 0));
    equal_widths &= of_rank(rank)[planes * rows] == of_rank(0)[planes * rows];
  }
  const float shift = Exponentials<float>::shift(maximum);
#pragma unroll 8
  for (int64_t rank = 0; rank < ranks; ++rank) {
    sum += plane_of(rank, 1) * expf(plane_of(rank, 0) - shift);
    target += plane_of(rank, 2);
    if (planes > 3) logit_sum += plane_of(rank, 3);
  }
  const float above_shift = logf(sum), log_sum = shift + above_shift;
  const float smoothing = planes > 3 ? label_smoothing : 0.0f;
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
  int64_t gradient_stride, rows;
  int columns;
  int64_t vocabulary_start, vocabulary_size;
  float label_smoothing, smoothed_share, z_loss;  // smoothed_share = label_smoothing / vocabulary_size
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
  for (int j = 0; j < width; ++j) values[j] = row.at(logits.at(j));
  const int64_t offset = row.label - first_column;
  if (offset >= 0 && offset < width) {
#pragma unroll
    for (int j = 0; j < width; ++j)
      if (j == offset) values[j] -= row.at_label;  // before rounding: p - 1 of a sure token keeps its digits
  }
  return pack<T>(values);
}

template <class T>
__global__ void __launch_bounds__(most_threads) gradient_kernel(GradientArguments<T> a) {
  // The last rows first: they are what the statistics left in L2.
  const int64_t row = a.rows - 1 - blockIdx.x;
  const T* logits = a.logits + row * a.logits_stride;
  T* gradient = a.gradient + row * a.gradient_stride;
  RowParts<T> parts(logits, a.columns);
  if ((reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(gradient)) % 16 != 0)
    parts.make_all_edges(a.columns);
  const int64_t label = a.labels[row];
  float factor = a.grad_loss[row * a.grad_loss_stride];
  const float lse = a.lse[row];
  T edge_logit = from_float<T>(0.0f);  // the first one's, on its way with the vectors
  if (static_cast<int>(threadIdx.x) < parts.edges) edge_logit = logits[parts.edge_column(threadIdx.x)];
  Packed<T> held[gradient_vectors];
  const auto load_vectors = [&](int start) {
#pragma unroll
    for (int i = 0; i < gradient_vectors; ++i) {
      const int vector = start + i * blockDim.x;
      // Of rows that become zero too: not to read them would be to wait for the label first.
      if (vector < parts.vectors) held[i] = load_packed<Cache::streamed>(logits + parts.vector_column(vector));
    }
  };
  load_vectors(threadIdx.x);  // outside of the loop, before which the compiler computes with label, factor and lse

  const bool is_zero = label == a.ignore_index || factor == 0.0f;
  if (label < 0 || label >= a.vocabulary_size) factor = nanf("");
  const RowGradient<T> of_row{lse, factor * (1.0f + 2.0f * a.z_loss * lse),
                           factor * a.smoothed_share,
                           factor * (1.0f - a.label_smoothing), label - a.vocabulary_start};
  for (int start = threadIdx.x; start < parts.vectors; start += gradient_vectors * blockDim.x) {
    if (start != static_cast<int>(threadIdx.x)) load_vectors(start);
#pragma unroll
    for (int i = 0; i < gradient_vectors; ++i) {
      const int vector = start + i * blockDim.x, column = parts.vector_column(vector);
      if (vector < parts.vectors)
        store_packed(gradient + column, is_zero ? Packed<T>{} : gradient_of(held[i], column, of_row));
    }
  }
  for (int edge = threadIdx.x; edge < parts.edges; edge += blockDim.x) {
    const int column = parts.edge_column(edge);
    if (edge != static_cast<int>(threadIdx.x)) edge_logit = logits[column];
    const float value = of_row.at(to_float(edge_logit)) - (column == of_row.label ? of_row.at_label : 0.0f);
    gradient[column] = from_float<T>(is_zero ? 0.0f : value);
  }
}

// Threads for a row of `columns`: all of it held at once where that is possible.
template <class T>
dim3 threads_for(int64_t columns, int vectors_per_thread) {
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
    const auto kernel = planes > 3 ? statistics_kernel<T, true> : statistics_kernel<T, false>;
    return launch(kernel, rows, threads_for<T>(columns, statistics_vectors), 0, stream, static_cast<const T*>(logits),
                  logits_stride, labels, statistics, rows, static_cast<int>(columns), vocabulary_start);
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
                                 rows,
                                 static_cast<int>(columns),
                                 vocabulary_start,
                                 vocabulary_size,
                                 label_smoothing,
                                 label_smoothing / static_cast<float>(vocabulary_size),
                                 z_loss,
                                 ignore_index};
    return launch(gradient_kernel<T>, rows, threads_for<T>(columns, gradient_vectors), 0, stream, a);
  });
}

}  // namespace k2::cuda
