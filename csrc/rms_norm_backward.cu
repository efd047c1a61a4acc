// RMSNorm (Zhang & Sennrich 2019) backward, with the gradient of the residual branch added in.
//
//   grad_x = rstd * (g - xhat * mean(g * xhat)) + grad_h,   g = grad_y * w, xhat = x * rstd, w = gamma or 1 + gamma
//   grad_gamma = sum over rows of grad_y * xhat
//
// Bytes per bf16 element: 6 (with grad_h 8), the least possible, and the partial sums of grad_gamma, which stay in L2.
// A fixed number of persistent blocks, each taking every partial_rows-th row. A thread copies its own vectors of the
// next rows to shared memory while it computes on this one, and reads back only what it copied itself: the ring needs
// no barrier, and the one barrier a row is that of the sum. grad_gamma stays in fp32 registers and becomes one row of
// the workspace a block; a second kernel adds these in a fixed order: no atomics, the same bits in every run on any
// GPU.
#include "rms_norm.cuh"

namespace k2::cuda {
namespace {

constexpr int ring_stages = 3;  // rows at hand: one in use, two on their way (96 KB at hidden size 8192)
// Elements of a row whose xhat and g a thread keeps over the barrier: half the instructions of forming them again, which
// at a few bytes an instruction is what would bound the kernel on an H200.
constexpr int kept_elements = 16;

template <class T>
struct BackwardArguments {
  const T *grad_y, *grad_h, *x;
  const void* gamma;
  const float* rstd;
  T* grad_x;
  float* workspace;  // [gridDim.x, hidden] or null
  int64_t rows;
  int hidden;
  float gamma_offset;
};

// xhat and g of one vector, in fp32.
template <class T>
struct Normalised {
  static constexpr int width = Packed<T>::count;
  float xhat[width], g[width];

  __device__ __forceinline__ Normalised() {}  // filled in later: an array of them is kept
  __device__ __forceinline__ Normalised(const Packed<T>& x, const Packed<T>& grad_y, const float (&w)[width],
                                        float rstd) {
#pragma unroll
    for (int j = 0; j < width; ++j) xhat[j] = x.at(j) * rstd, g[j] = grad_y.at(j) * w[j];
  }
  // dx. `mean` is mean(g * xhat) over the row; grad_h is zero where none is given.
  __device__ __forceinline__ Packed<T> input_gradient(float rstd, float mean, const Packed<T>& grad_h) const {
    float result[width];
#pragma unroll
    for (int j = 0; j < width; ++j) result[j] = rstd * (g[j] - xhat[j] * mean) + grad_h.at(j);
    return pack<T>(result);
  }
};

// w of a thread's vectors: ready in fp32 where registers are left for that, else packed as gamma is stored.
template <class T, class G, int PER_THREAD, bool WIDE>
struct Weights {
  static constexpr int width = Packed<T>::count;
  Weight<T, G> packed[WIDE ? 1 : PER_THREAD];
  float wide[WIDE ? PER_THREAD : 1][width];

  template <bool ALIGNED>
  __device__ __forceinline__ void load(int i, const void* gamma, int index, int columns, float offset) {
    packed[WIDE ? 0 : i].template load<ALIGNED>(gamma, index, columns);
    if constexpr (WIDE) unpack(packed[0], offset, wide[i]);
  }
  __device__ __forceinline__ void get(int i, float offset, float (&w)[width]) const {
    if constexpr (WIDE) {
#pragma unroll
      for (int j = 0; j < width; ++j) w[j] = wide[i][j];
    } else {
      unpack(packed[i], offset, w);
    }
  }

 private:
  __device__ __forceinline__ static void unpack(const Weight<T, G>& packed, float offset, float (&w)[width]) {
#pragma unroll
    for (int j = 0; j < width; ++j) w[j] = packed.at(j, offset);
  }
};

// The vectors of the rows to come, in shared memory: [stage][tensor][vector]. A thread touches only its own vectors.
template <class T, bool ALIGNED>
struct Ring {
  Packed<T>* memory;
  int tensors, vectors;  // tensors: x, grad_y and, if given, grad_h

  __device__ __forceinline__ Packed<T>* at(int stage, int tensor, int index) const {
    return memory + (stage * tensors + tensor) * vectors + index;
  }
  // 16 bytes at once: of a struct in shared memory the compiler fetches each member by itself.
  __device__ __forceinline__ Packed<T> read(int stage, int tensor, int index) const {
    return load_packed(reinterpret_cast<const T*>(at(stage, tensor, index)));
  }

  template <int PER_THREAD>
  __device__ __forceinline__ void fetch(const BackwardArguments<T>& a, int64_t row, int stage) const {
    if (row < a.rows) {
      const int64_t start = row * a.hidden;
#pragma unroll(ALIGNED ? PER_THREAD : 1)
      for (int i = 0; i < PER_THREAD; ++i) {
        const int index = i * blockDim.x + threadIdx.x;
        if (index >= vectors) continue;
        copy(at(stage, 0, index), a.x + start, index, a.hidden);
        copy(at(stage, 1, index), a.grad_y + start, index, a.hidden);
        if (a.grad_h != nullptr) copy(at(stage, 2, index), a.grad_h + start, index, a.hidden);
      }
    }
    close_copy_group();  // an empty group where there is no row: the count of groups stays that of rows
  }

 private:
  __device__ __forceinline__ static void copy(Packed<T>* slot, const T* row, int index, int columns) {
    if constexpr (ALIGNED) copy_async_16_bytes(slot, row + index * Packed<T>::count);
    else *slot = load_of_row<false>(row, index, columns);
  }
};

template <class T, class G, bool ALIGNED, int PER_THREAD>
__global__ void __launch_bounds__(rms_norm_threads) backward_kernel(BackwardArguments<T> a) {
  constexpr int width = Packed<T>::count;
  constexpr bool keeps = PER_THREAD * width <= kept_elements;
  K2_SHARED(float, scratch, 2 * warp_threads);
  const int vectors = divide_up(a.hidden, width);
  const Ring<T, ALIGNED> ring{static_cast<Packed<T>*>(dynamic_shared_memory()), a.grad_h != nullptr ? 3 : 2, vectors};
  Weights<T, G, PER_THREAD, keeps> weights;
  float grad_gamma[PER_THREAD][width] = {};
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
    if (static_cast<int>(i * blockDim.x + threadIdx.x) < vectors)
      weights.template load<ALIGNED>(i, a.gamma, i * blockDim.x + threadIdx.x, a.hidden, a.gamma_offset);
  for (int stage = 0; stage < ring_stages - 1; ++stage)
    ring.template fetch<PER_THREAD>(a, blockIdx.x + static_cast<int64_t>(stage) * gridDim.x, stage);

  int stage = 0, parity = 0;
  float next_rstd = blockIdx.x < a.rows ? a.rstd[blockIdx.x] : 0.0f;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    // Asked for a row ahead: the block's warps wait together, and nothing would hide that wait for memory.
    const float rstd = next_rstd;
    if (row + gridDim.x < a.rows) next_rstd = a.rstd[row + gridDim.x];
    const int free_stage = stage == 0 ? ring_stages - 1 : stage - 1;  // the one that the previous row used
    ring.template fetch<PER_THREAD>(a, row + (ring_stages - 1) * static_cast<int64_t>(gridDim.x), free_stage);
    wait_for_copies<ring_stages - 1>();
    const auto normalise = [&](int i, int index, const Packed<T>& grad_y) {
      float w[width];
      weights.get(i, a.gamma_offset, w);
      return Normalised<T>(ring.read(stage, 0, index), grad_y, w, rstd);
    };
    Normalised<T> kept[keeps ? PER_THREAD : 1];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index >= vectors) continue;
      const Packed<T> grad_y = ring.read(stage, 1, index);
      const Normalised<T> row_part = normalise(i, index, grad_y);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        grad_gamma[i][j] += grad_y.at(j) * row_part.xhat[j];
        sum += row_part.g[j] * row_part.xhat[j];
      }
      if constexpr (keeps) kept[i] = row_part;
    }
    const float mean = block_sum(sum, scratch + parity * warp_threads) / static_cast<float>(a.hidden);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index >= vectors) continue;
      Packed<T> grad_h{};
      if (a.grad_h != nullptr) grad_h = ring.read(stage, 2, index);
      Packed<T> grad_x;
      if constexpr (keeps) grad_x = kept[i].input_gradient(rstd, mean, grad_h);
      else grad_x = normalise(i, index, ring.read(stage, 1, index)).input_gradient(rstd, mean, grad_h);
      store_to_row<ALIGNED>(a.grad_x + row * a.hidden, index, a.hidden, grad_x);
    }
    stage = stage == ring_stages - 1 ? 0 : stage + 1;
    parity ^= 1;  // the next row's sum may start while a slow warp still reads this one's
  }

  if (a.workspace == nullptr) return;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    if (index >= vectors) continue;
#pragma unroll
    for (int j = 0; j < width; j += 4) {
      const float sums[4] = {grad_gamma[i][j], grad_gamma[i][j + 1], grad_gamma[i][j + 2], grad_gamma[i][j + 3]};
      store_to_row<ALIGNED>(a.workspace + static_cast<int64_t>(blockIdx.x) * a.hidden, (index * width + j) / 4,
                            a.hidden, pack<float>(sums));
    }
  }
}

// The same for rows of any length: dgamma is added up in the block's own row of the workspace, which stays in L2.
template <class T, class G, bool ALIGNED>
__global__ void __launch_bounds__(rms_norm_threads) backward_looped_kernel(BackwardArguments<T> a) {
  constexpr int width = Packed<T>::count;
  K2_SHARED(float, scratch, 2 * warp_threads);
  const int vectors = divide_up(a.hidden, width);
  float* partial = a.workspace == nullptr ? nullptr : a.workspace + static_cast<int64_t>(blockIdx.x) * a.hidden;
  if (partial != nullptr)
    for (int index = threadIdx.x; index < vectors; index += rms_norm_threads)
      for (int j = 0; j < width; j += 4)
        store_to_row<ALIGNED>(partial, (index * width + j) / 4, a.hidden, Packed<float>{});

  int parity = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, parity ^= 1) {
    const int64_t start = row * a.hidden;
    const float rstd = a.rstd[row];
    float sum = 0.0f;
    for (int index = threadIdx.x; index < vectors; index += rms_norm_threads) {
      const Packed<T> x = load_of_row<ALIGNED>(a.x + start, index, a.hidden),
                      grad_y = load_of_row<ALIGNED>(a.grad_y + start, index, a.hidden);
      Weight<T, G> weight;
      weight.template load<ALIGNED>(a.gamma, index, a.hidden);
#pragma unroll
      for (int j = 0; j < width; ++j)
        sum += grad_y.at(j) * weight.at(j, a.gamma_offset) * (x.at(j) * rstd);
    }
    const float mean = block_sum(sum, scratch + parity * warp_threads) / static_cast<float>(a.hidden);
    for (int index = threadIdx.x; index < vectors; index += rms_norm_threads) {
      const Packed<T> x = load_of_row<ALIGNED>(a.x + start, index, a.hidden),
                      grad_y = load_of_row<ALIGNED>(a.grad_y + start, index, a.hidden);
      Packed<T> grad_h{};
      if (a.grad_h != nullptr) grad_h = load_of_row<ALIGNED, Cache::streamed>(a.grad_h + start, index, a.hidden);
      Weights<T, G, 1, true> weight;
      weight.template load<ALIGNED>(0, a.gamma, index, a.hidden, a.gamma_offset);
      store_to_row<ALIGNED>(a.grad_x + start, index, a.hidden,
                            Normalised<T>(x, grad_y, weight.wide[0], rstd).input_gradient(rstd, mean, grad_h));
      if (partial == nullptr) continue;
#pragma unroll
      for (int j = 0; j < width; j += 4) {
        const Packed<float> before = load_of_row<ALIGNED>(partial, (index * width + j) / 4, a.hidden);
        float sums[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[k] = before.at(k) + grad_y.at(j + k) * (x.at(j + k) * rstd);
        store_to_row<ALIGNED>(partial, (index * width + j) / 4, a.hidden, pack<float>(sums));
      }
    }
  }
}

// dgamma[c] = sum over p of workspace[p, c]: 32 columns a block; thread row r adds p = r, r + 32, ..., then a warp the
// 32 sums.
template <class G>
__global__ void __launch_bounds__(1024)
    add_partial_rows_kernel(const float* workspace, G* grad_gamma, int64_t partial_rows, int hidden) {
  K2_SHARED(float, tile, warp_threads*(warp_threads + 1));
  const int column = blockIdx.x * warp_threads + threadIdx.x;
  float sum = 0.0f;
  if (column < hidden) {
#pragma unroll 4
    for (int64_t partial = threadIdx.y; partial < partial_rows; partial += warp_threads)
      sum += workspace[partial * hidden + column];
  }
  tile[threadIdx.y * (warp_threads + 1) + threadIdx.x] = sum;
  __syncthreads();
  sum = warp_reduce(tile[threadIdx.x * (warp_threads + 1) + threadIdx.y], Sum{});
  const int summed_column = blockIdx.x * warp_threads + threadIdx.y;
  if (threadIdx.x == 0 && summed_column < hidden) grad_gamma[summed_column] = from_float<G>(sum);
}

template <class T, class G, bool ALIGNED>
int start_backward(const BackwardArguments<T>& a, int64_t partial_rows, void* stream) {
  const int vectors = divide_up(a.hidden, Packed<T>::count);
  const size_t ring_bytes = sizeof(Packed<T>) * vectors * ring_stages * (a.grad_h != nullptr ? 3 : 2);
  int device = 0, shared_limit = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return refused(error);
  if (const cudaError_t error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return refused(error);
  const size_t static_bytes = 2 * warp_threads * sizeof(float);
  if (vectors > 4 * rms_norm_threads || ring_bytes + static_bytes > static_cast<size_t>(shared_limit))
    return launch(backward_looped_kernel<T, G, ALIGNED>, partial_rows, dim3(rms_norm_threads), 0, stream, a);
  if (vectors > 2 * rms_norm_threads)
    return launch(backward_kernel<T, G, ALIGNED, 4>, partial_rows, dim3(whole_warps(divide_up(vectors, 4))), ring_bytes,
                  stream, a);
  return launch(backward_kernel<T, G, ALIGNED, 2>, partial_rows, dim3(whole_warps(divide_up(vectors, 2))), ring_bytes,
                stream, a);
}

}  // namespace

int rms_norm_backward(const void* grad_y, const void* grad_h, const void* x, const void* gamma, const float* rstd,
                      void* grad_x, void* grad_gamma, float* workspace, int64_t partial_rows, int64_t rows,
                      int64_t hidden, bool zero_centered, DType dtype, DType gamma_dtype, void* stream) {
  const int error = with_types(dtype, gamma_dtype, [&](auto t, auto g) {
    using T = typename decltype(t)::type;
    using G = typename decltype(g)::type;
    const BackwardArguments<T> a{static_cast<const T*>(grad_y),
                                 static_cast<const T*>(grad_h),
                                 static_cast<const T*>(x),
                                 gamma,
                                 rstd,
                                 static_cast<T*>(grad_x),
                                 workspace,
                                 rows,
                                 static_cast<int>(hidden),
                                 zero_centered ? 1.0f : 0.0f};
    const bool aligned = hidden % Packed<T>::count == 0 && is_aligned(grad_y) && is_aligned(grad_h) && is_aligned(x) &&
                         is_aligned(gamma) && is_aligned(grad_x) && is_aligned(workspace);
    return aligned ? start_backward<T, G, true>(a, partial_rows, stream)
                   : start_backward<T, G, false>(a, partial_rows, stream);
  });
  if (error != cudaSuccess || grad_gamma == nullptr) return error;
  return with_type(gamma_dtype, [&](auto g) {
    using G = typename decltype(g)::type;
    const dim3 threads(warp_threads, warp_threads);
    return launch(add_partial_rows_kernel<G>, divide_up<int64_t>(hidden, warp_threads), threads, 0, stream,
                  static_cast<const float*>(workspace), static_cast<G*>(grad_gamma), partial_rows,
                  static_cast<int>(hidden));
  });
}

// About one block of 512 threads an SM (132 on an H100), more of them where rows are short, at least 4 rows each; a
// function of the shape alone, so that dgamma has the same bits on any GPU.
int64_t rms_norm_partial_rows(int64_t rows, int64_t hidden) {
  int64_t most = 1024;
  while (most > 128 && most * hidden > (int64_t{1} << 20)) most /= 2;
  const int64_t enough = divide_up<int64_t>(rows, 4);
  return enough < 1 ? 1 : enough < most ? enough : most;
}

}  // namespace k2::cuda
