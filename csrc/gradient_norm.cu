// The square of the norm of all gradients, and the scaling that clips them: as few launches as their table fits.
//
//   squared_norm   result = (sum of squares in fp64, count of elements that are not finite)
//   scale          every tensor times *factor, in place; nothing is written where the factor is 1
//
// Deterministic: each block adds one fixed chunk of one tensor, and one last block adds the chunks in a fixed order.
// fp64 because the square of a gradient of 65 B elements has more range than fp32, and costs nothing where memory is
// the limit.
#include "multi_tensor.cuh"

namespace k2::cuda {
namespace {

constexpr int add_chunks_threads = 1024;

// workspace: one pair (sum of squares, not finite) a chunk
template <class T>
__global__ void __launch_bounds__(multi_tensor_threads)
    chunk_norms_kernel(const __grid_constant__ TensorTable<1> table, double* workspace) {
  constexpr int group = multi_tensor_group;
  K2_SHARED(double, sums, warp_threads);
  K2_SHARED(double, counts, warp_threads);
  const Part part(table);
  const T* elements = reinterpret_cast<const T*>(table.addresses[0][part.tensor]) + part.first;
  double sum = 0.0;
  int not_finite = 0;
  const auto add = [&](const float (&values)[group]) {
#pragma unroll
    for (int i = 0; i < group; ++i) {
      sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
      not_finite += !(fabsf(values[i]) <= 3.402823466e38f);
    }
  };
  if (part.size == multi_tensor_chunk && reinterpret_cast<uintptr_t>(elements) % 16 == 0) {
    WholeChunk<T>(elements).for_each_group(add);
  } else {
    constexpr int width = Packed<T>::count;
    const int size = static_cast<int>(part.size);
    for (int first = Group<width>::first(); first < size; first += multi_tensor_threads * group) {
      float values[group];
      load_group<width>(elements, first, size, values);
      add(values);
    }
  }
  sum = block_sum(sum, sums);
  const double count = block_sum(static_cast<double>(not_finite), counts);
  if (threadIdx.x == 0) workspace[2 * blockIdx.x] = sum, workspace[2 * blockIdx.x + 1] = count;
}

// One block, of as many threads as it can have: a rank of K2 has a quarter of a million chunks, and every round of loads
// takes its time.
__global__ void __launch_bounds__(add_chunks_threads)
    add_chunks_kernel(const double* workspace, int64_t chunks, double* result) {
  K2_SHARED(double, sums, warp_threads);
  K2_SHARED(double, counts, warp_threads);
  double sum = 0.0, count = 0.0;
#pragma unroll 4
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += add_chunks_threads) {
    sum += workspace[2 * chunk];
    count += workspace[2 * chunk + 1];
  }
  sum = block_sum(sum, sums);
  count = block_sum(count, counts);
  if (threadIdx.x == 0) result[0] = sum, result[1] = count;
}

template <class T>
__global__ void __launch_bounds__(multi_tensor_threads)
    scale_kernel(const __grid_constant__ TensorTable<1> table, const float* factor) {
  constexpr int group = multi_tensor_group;
  const float by = *factor;
  if (by == 1.0f) return;
  const Part part(table);
  T* elements = reinterpret_cast<T*>(table.addresses[0][part.tensor]) + part.first;
  constexpr int width = Packed<T>::count;
  const int size = static_cast<int>(part.size);
#pragma unroll 2
  for (int first = Group<width>::first(); first < size; first += multi_tensor_threads * group) {
    float values[group];
    load_group<width>(elements, first, size, values);
#pragma unroll
    for (int i = 0; i < group; ++i) values[i] *= by;
    store_group<width>(elements, first, size, values);
  }
}

int64_t all_chunks(const int64_t* sizes, int64_t count) {
  int64_t chunks = 0;
  for (int64_t tensor = 0; tensor < count; ++tensor) chunks += chunks_of(sizes[tensor]);
  return chunks;
}

}  // namespace

int64_t squared_norm_workspace(const int64_t* sizes, int64_t count) { return 2 * all_chunks(sizes, count); }

int squared_norm(const int64_t* tensors, const int64_t* sizes, int64_t count, double* workspace, double* result,
                 DType dtype, void* stream) {
  int64_t chunks_before = 0;
  const int64_t* const lists[1] = {tensors};
  const int error = with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return for_each_table(lists, sizes, count, [&](const TensorTable<1>& table, int64_t blocks) {
      double* pairs = workspace + 2 * chunks_before;
      chunks_before += blocks;
      return launch(chunk_norms_kernel<T>, blocks, dim3(multi_tensor_threads), 0, stream, table, pairs);
    });
  });
  if (error != cudaSuccess) return error;
  return launch(add_chunks_kernel, 1, dim3(add_chunks_threads), 0, stream,
                static_cast<const double*>(workspace), chunks_before, result);
}

int scale(const int64_t* tensors, const int64_t* sizes, int64_t count, const float* factor, DType dtype, void* stream) {
  const int64_t* const lists[1] = {tensors};
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return for_each_table(lists, sizes, count, [&](const TensorTable<1>& table, int64_t blocks) {
      return launch(scale_kernel<T>, blocks, dim3(multi_tensor_threads), 0, stream, table, factor);
    });
  });
}

}  // namespace k2::cuda
