// SwiGLU (Shazeer 2020) on the packed output of the first feed-forward GEMM, [T, 2F] = [gate | up].
//
//   forward   out = gate * s * up,  s = sigmoid(gate) = 1 / (1 + e^-gate)
//   backward  d gate = d out * up * s * (1 + gate * (1 - s)),  d up = d out * gate * s;  packed alike, maybe in place
//
// Bytes per output element in bf16: forward 6, backward 10, the least possible. Elementwise work is cut into tiles of
// the whole output, not into rows: every thread has work at any F (K2's 2752 is 344 vectors, no multiple of a block).
// A thread has two vectors of each input on their way before it needs the first.
#include "primitives.cuh"

namespace k2::cuda {
namespace {

constexpr int tile_threads = 256;
constexpr int vectors_per_thread = 2;
constexpr int tile_vectors = tile_threads * vectors_per_thread;

// Where one vector of the output lies: its row, and its first column.
struct Place {
  int64_t row;
  int column;
};

// Vectors are numbered through all rows. One 64-bit division finds the tile's start, 32-bit ones its vectors. Not
// ALIGNED: a "vector" is one element, so that a row may have any number of them at any address.
template <class T, bool ALIGNED>
struct Tiles {
  static constexpr int width = ALIGNED ? Packed<T>::count : 1;
  int64_t first_row, vectors_left;
  int first_vector, vectors_per_row;

  __device__ __forceinline__ Tiles(int64_t rows, int columns) : vectors_per_row(columns / width) {
    const int64_t start = static_cast<int64_t>(blockIdx.x) * tile_vectors;
    first_row = start / vectors_per_row;
    first_vector = static_cast<int>(start - first_row * vectors_per_row);
    vectors_left = rows * vectors_per_row - start;
  }
  __device__ __forceinline__ bool has(int i) const {
    return i * tile_threads + static_cast<int>(threadIdx.x) < vectors_left;
  }
  __device__ __forceinline__ Place place(int i) const {
    const unsigned vector = first_vector + i * tile_threads + threadIdx.x, row = vector / vectors_per_row;
    return {first_row + row, static_cast<int>(vector - row * vectors_per_row) * width};
  }
};

template <bool ALIGNED, class T>
__device__ __forceinline__ Packed<T> read(const T* address) {
  if constexpr (ALIGNED) return load_packed<Cache::streamed>(address);
  else return load_of_row<false>(address, 0, 1);
}

template <bool ALIGNED, class T>
__device__ __forceinline__ void write(T* address, const Packed<T>& packed) {
  store_to_row<ALIGNED>(address, 0, 1, packed);
}

template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal<T>(1.0f + exponential<T>(-x));
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(tile_threads) forward_kernel(const T* packed, T* out, int64_t rows, int columns) {
  const Tiles<T, ALIGNED> tiles(rows, columns);
  Place places[vectors_per_thread];
  Packed<T> gate[vectors_per_thread], up[vectors_per_thread];
#pragma unroll
  for (int i = 0; i < vectors_per_thread; ++i) {
    if (!tiles.has(i)) continue;
    const Place at = places[i] = tiles.place(i);
    gate[i] = read<ALIGNED>(packed + at.row * 2 * columns + at.column);
    up[i] = read<ALIGNED>(packed + at.row * 2 * columns + columns + at.column);
  }
#pragma unroll
  for (int i = 0; i < vectors_per_thread; ++i) {
    if (!tiles.has(i)) continue;
    const Place at = places[i];
    float result[Packed<T>::count] = {};
#pragma unroll
    for (int j = 0; j < Tiles<T, ALIGNED>::width; ++j) {
      const float g = gate[i].at(j);
      result[j] = g * sigmoid<T>(g) * up[i].at(j);
    }
    write<ALIGNED>(out + at.row * columns + at.column, pack<T>(result));
  }
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(tile_threads)
    backward_kernel(const T* grad_out, const T* packed, T* grad_packed, int64_t rows, int columns) {
  const Tiles<T, ALIGNED> tiles(rows, columns);
  Place places[vectors_per_thread];
  Packed<T> grad[vectors_per_thread], gate[vectors_per_thread], up[vectors_per_thread];
#pragma unroll
  for (int i = 0; i < vectors_per_thread; ++i) {
    if (!tiles.has(i)) continue;
    const Place at = places[i] = tiles.place(i);
    grad[i] = read<ALIGNED>(grad_out + at.row * columns + at.column);
    gate[i] = read<ALIGNED>(packed + at.row * 2 * columns + at.column);
    up[i] = read<ALIGNED>(packed + at.row * 2 * columns + columns + at.column);
  }
#pragma unroll
  for (int i = 0; i < vectors_per_thread; ++i) {
    if (!tiles.has(i)) continue;
    const Place at = places[i];
    float grad_gate[Packed<T>::count] = {}, grad_up[Packed<T>::count] = {};
#pragma unroll
    for (int j = 0; j < Tiles<T, ALIGNED>::width; ++j) {
      const float d = grad[i].at(j), g = gate[i].at(j), u = up[i].at(j), s = sigmoid<T>(g);
      grad_gate[j] = d * u * s * (1.0f + g * (1.0f - s));
      grad_up[j] = d * g * s;
    }
    T* row = grad_packed + at.row * 2 * columns;
    write<ALIGNED>(row + at.column, pack<T>(grad_gate));
    write<ALIGNED>(row + columns + at.column, pack<T>(grad_up));
  }
}

template <class T, bool ALIGNED>
int64_t tiles_of(int64_t rows, int64_t columns) {
  return divide_up<int64_t>(rows * (columns / Tiles<T, ALIGNED>::width), tile_vectors);
}

}  // namespace

int swiglu_forward(const void* packed, void* out, int64_t rows, int64_t columns, DType dtype, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto start = [&](auto kernel, int64_t tiles) {
      return launch(kernel, tiles, dim3(tile_threads), 0, stream, static_cast<const T*>(packed), static_cast<T*>(out),
                    rows, static_cast<int>(columns));
    };
    const bool aligned = columns % Packed<T>::count == 0 && is_aligned(packed) && is_aligned(out);
    return aligned ? start(forward_kernel<T, true>, tiles_of<T, true>(rows, columns))
                   : start(forward_kernel<T, false>, tiles_of<T, false>(rows, columns));
  });
}

int swiglu_backward(const void* grad_out, const void* packed, void* grad_packed, int64_t rows, int64_t columns,
                    DType dtype, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto start = [&](auto kernel, int64_t tiles) {
      return launch(kernel, tiles, dim3(tile_threads), 0, stream, static_cast<const T*>(grad_out),
                    static_cast<const T*>(packed), static_cast<T*>(grad_packed), rows, static_cast<int>(columns));
    };
    const bool aligned =
        columns % Packed<T>::count == 0 && is_aligned(grad_out) && is_aligned(packed) && is_aligned(grad_packed);
    return aligned ? start(backward_kernel<T, true>, tiles_of<T, true>(rows, columns))
                   : start(backward_kernel<T, false>, tiles_of<T, false>(rows, columns));
  });
}

}  // namespace k2::cuda
