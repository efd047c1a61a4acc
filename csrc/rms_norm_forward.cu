// RMSNorm (Zhang & Sennrich 2019) forward, with the residual add of a transformer layer fused in.
//
//   h = x + residual (rounded, stored; or x itself)
//   y = h * rstd * w,  rstd = 1 / sqrt(mean(h^2) + epsilon),  w = gamma or 1 + gamma
//
// x, residual, h, y [rows, hidden]; gamma [hidden]; rstd [rows] fp32, for the backward.
// Bytes per bf16 element: 4 (with residual 8), the least possible. One block a row, or one warp where that is enough;
// the row stays packed in registers across the one barrier. Longer rows are read again, from L2, by the looped kernel.
#include "rms_norm.cuh"

namespace k2::cuda {
namespace {

constexpr int forward_vectors = 4;  // 16-byte vectors of a row that a thread keeps

template <class T>
struct ForwardArguments {
  const T *x, *residual;
  const void* gamma;
  T *h, *y;
  float* rstd;
  int64_t rows;
  int hidden;
  float epsilon, gamma_offset;
};

template <class T>
__device__ __forceinline__ Packed<T> rounded_sum(const Packed<T>& one, const Packed<T>& other) {
  float sum[Packed<T>::count];
#pragma unroll
  for (int j = 0; j < Packed<T>::count; ++j) sum[j] = one.at(j) + other.at(j);
  return pack<T>(sum);
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const Packed<T>& packed) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < Packed<T>::count; ++j) sum += packed.at(j) * packed.at(j);
  return sum;
}

template <bool ALIGNED, class T, class G>
__device__ __forceinline__ void store_normalised(const ForwardArguments<T>& a, const Packed<T>& h,
                                                 const Weight<T, G>& weight, int64_t row_start, int index, float rstd) {
  float y[Packed<T>::count];
#pragma unroll
  for (int j = 0; j < Packed<T>::count; ++j) y[j] = h.at(j) * rstd * weight.at(j, a.gamma_offset);
  store_to_row<ALIGNED>(a.y + row_start, index, a.hidden, pack<T>(y));
}

// Threads (x, y): x along the row, y rows; several rows a block only where x is one warp, which then needs no barrier.
template <class T, class G, bool ALIGNED>
__global__ void __launch_bounds__(rms_norm_threads) forward_kernel(ForwardArguments<T> a) {
  K2_SHARED(float, scratch, warp_threads);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;  // a whole warp, of a block without barriers
  const int64_t row_start = row * a.hidden;
  const int vectors = divide_up(a.hidden, Packed<T>::count);
  Packed<T> h[forward_vectors];
#pragma unroll
  for (int i = 0; i < forward_vectors; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    if (index < vectors) h[i] = load_of_row<ALIGNED, Cache::streamed>(a.x + row_start, index, a.hidden);
  }
  if (a.residual != nullptr) {
    Packed<T> residual[forward_vectors];  // all of it before the first store, which no later load may overtake
#pragma unroll
    for (int i = 0; i < forward_vectors; ++i) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index < vectors) residual[i] = load_of_row<ALIGNED, Cache::streamed>(a.residual + row_start, index, a.hidden);
    }
#pragma unroll
    for (int i = 0; i < forward_vectors; ++i) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index >= vectors) continue;
      h[i] = rounded_sum(h[i], residual[i]);
      store_to_row<ALIGNED, Cache::streamed>(a.h + row_start, index, a.hidden, h[i]);
    }
  }
  Weight<T, G> weight[forward_vectors];  // all on its way before the first of h is waited for
#pragma unroll
  for (int i = 0; i < forward_vectors; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    if (index < vectors) weight[i].template load<ALIGNED>(a.gamma, index, a.hidden);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < forward_vectors; ++i)
    if (static_cast<int>(i * blockDim.x + threadIdx.x) < vectors) sum += sum_of_squares(h[i]);
  sum = blockDim.x == warp_threads ? warp_reduce(sum, Sum{}) : block_sum(sum, scratch);
  const float rstd = reciprocal_root(sum / static_cast<float>(a.hidden) + a.epsilon);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < forward_vectors; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    if (index < vectors) store_normalised<ALIGNED>(a, h[i], weight[i], row_start, index, rstd);
  }
}

template <class T, class G, bool ALIGNED>
__global__ void __launch_bounds__(rms_norm_threads) forward_looped_kernel(ForwardArguments<T> a) {
  K2_SHARED(float, scratch, warp_threads);
  const int64_t row = blockIdx.x, row_start = row * a.hidden;
  const int vectors = divide_up(a.hidden, Packed<T>::count);
  float sum = 0.0f;
#pragma unroll 4
  for (int index = threadIdx.x; index < vectors; index += rms_norm_threads) {
    Packed<T> h = load_of_row<ALIGNED>(a.x + row_start, index, a.hidden);
    if (a.residual != nullptr) {
      h = rounded_sum(h, load_of_row<ALIGNED, Cache::streamed>(a.residual + row_start, index, a.hidden));
      store_to_row<ALIGNED>(a.h + row_start, index, a.hidden, h);
    }
    sum += sum_of_squares(h);
  }
  const float rstd = reciprocal_root(block_sum(sum, scratch) / static_cast<float>(a.hidden) + a.epsilon);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  const T* normalised = a.residual != nullptr ? a.h : a.x;  // each thread reads what it wrote itself
#pragma unroll 4
  for (int index = threadIdx.x; index < vectors; index += rms_norm_threads) {
    Weight<T, G> weight;
    weight.template load<ALIGNED>(a.gamma, index, a.hidden);
    store_normalised<ALIGNED>(a, load_of_row<ALIGNED>(normalised + row_start, index, a.hidden), weight, row_start,
                              index, rstd);
  }
}

template <class T, class G, bool ALIGNED>
int start_forward(const ForwardArguments<T>& a, void* stream) {
  const int vectors = divide_up(a.hidden, Packed<T>::count);
  if (vectors > rms_norm_threads * forward_vectors)
    return launch(forward_looped_kernel<T, G, ALIGNED>, a.rows, dim3(rms_norm_threads), 0, stream, a);
  const int threads = whole_warps(divide_up(vectors, forward_vectors));
  const int rows_per_block = threads == warp_threads ? 4 : 1;
  return launch(forward_kernel<T, G, ALIGNED>, divide_up<int64_t>(a.rows, rows_per_block),
                dim3(threads, rows_per_block), 0, stream, a);
}

}  // namespace

int rms_norm_forward(const void* x, const void* residual, const void* gamma, void* h, void* y, float* rstd,
                     int64_t rows, int64_t hidden, float epsilon, bool zero_centered, DType dtype, DType gamma_dtype,
                     void* stream) {
  if (rows == 0) return cudaSuccess;
  return with_types(dtype, gamma_dtype, [&](auto t, auto g) {
    using T = typename decltype(t)::type;
    using G = typename decltype(g)::type;
    const ForwardArguments<T> a{static_cast<const T*>(x),
                                static_cast<const T*>(residual),
                                gamma,
                                static_cast<T*>(h),
                                static_cast<T*>(y),
                                rstd,
                                rows,
                                static_cast<int>(hidden),
                                epsilon,
                                zero_centered ? 1.0f : 0.0f};
    const bool aligned = hidden % Packed<T>::count == 0 && is_aligned(x) && is_aligned(residual) && is_aligned(gamma) &&
                         is_aligned(h) && is_aligned(y);
    return aligned ? start_forward<T, G, true>(a, stream) : start_forward<T, G, false>(a, stream);
  });
}

}  // namespace k2::cuda
