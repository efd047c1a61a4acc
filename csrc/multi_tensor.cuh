// One launch over many tensors of many sizes: a table of addresses that travels as a kernel parameter.
// In: host arrays of addresses and sizes. Out: blocks that each know their tensor and the part of it that is theirs.
// A kernel takes 4 KB of parameters; longer lists become several launches, each with the next part of the list.
#pragma once
#include "primitives.cuh"

namespace k2::cuda {

constexpr int multi_tensor_threads = 256;
constexpr int multi_tensor_group = 8;  // elements that a thread takes at once, as vectors
constexpr int64_t multi_tensor_chunk = 8192;  // elements of a block: 4 groups a thread

template <int LISTS>
struct TensorTable {
  static constexpr int capacity = (4096 - 256) / (LISTS * 8 + 12);
  int64_t addresses[LISTS][capacity];
  int64_t sizes[capacity];
  int32_t end_block[capacity];  // one past the last block of the tensor
  int32_t count;
};

// A block's part of its tensor.
struct Part {
  int tensor;
  int64_t first, size;

  template <int LISTS>
  __device__ __forceinline__ explicit Part(const TensorTable<LISTS>& table) {
    const int block = blockIdx.x;
    int low = 0, high = table.count - 1;  // the first tensor whose end lies beyond this block
    while (low < high) {
      const int middle = (low + high) / 2;
      if (table.end_block[middle] > block) high = middle;
      else low = middle + 1;
    }
    tensor = low;
    first = (block - (low == 0 ? 0 : table.end_block[low - 1])) * multi_tensor_chunk;
    const int64_t left = table.sizes[low] - first;
    size = left < multi_tensor_chunk ? left : multi_tensor_chunk;
  }
};

// A thread's group: vectors of WIDTH elements, each as far from the one before as the block's vectors reach. The vectors
// of a warp lie side by side, so that one access of theirs moves whole sectors of 32 bytes: were all of a thread's
// elements consecutive, each of the two accesses to fp32 would move every sector for one half of it.
template <int WIDTH>
struct Group {
  static constexpr int vectors = multi_tensor_group / WIDTH, stride = multi_tensor_threads * WIDTH;

  __device__ __forceinline__ static int first() { return threadIdx.x * WIDTH; }
  // Whether all of the group that begins at element `first` is there, where whole vectors may be accessed.
  template <class T>
  __device__ __forceinline__ static bool is_whole(const T* chunk, int first, int size) {
    return first + (vectors - 1) * stride + WIDTH <= size &&
           reinterpret_cast<uintptr_t>(chunk) % (WIDTH * sizeof(T)) == 0;
  }
  __device__ __forceinline__ static int element(int first, int i) { return first + i / WIDTH * stride + i % WIDTH; }
};

template <int WIDTH, class T>
using VectorWords = std::conditional_t<WIDTH * sizeof(T) == 16, uint4, uint2>;

template <int WIDTH, class T>
__device__ __forceinline__ void unpack_vector(const VectorWords<WIDTH, T>& words, float* values) {
  constexpr int in_word = Word<T>::count;
#pragma unroll
  for (int word = 0; word < WIDTH / in_word; ++word) {
    float parts[in_word];
    Word<T>::unpack(reinterpret_cast<const uint32_t*>(&words)[word], parts);
#pragma unroll
    for (int j = 0; j < in_word; ++j) values[word * in_word + j] = parts[j];
  }
}

// The group of a chunk of `size` elements that begins at `first`; what lies beyond the chunk reads as zero.
template <int WIDTH, class T>
__device__ __forceinline__ void load_group(const T* chunk, int first, int size, float (&values)[multi_tensor_group]) {
  using G = Group<WIDTH>;
  if (G::is_whole(chunk, first, size)) {
    VectorWords<WIDTH, T> words[G::vectors];
#pragma unroll
    for (int i = 0; i < G::vectors; ++i)
      words[i] = load_words<VectorWords<WIDTH, T>, Cache::streamed>(chunk + first + i * G::stride);
#pragma unroll
    for (int i = 0; i < G::vectors; ++i) unpack_vector<WIDTH, T>(words[i], values + i * WIDTH);
  } else {
#pragma unroll
    for (int i = 0; i < multi_tensor_group; ++i) {
      const int element = G::element(first, i);
      values[i] = element < size ? to_float(chunk[element]) : 0.0f;
    }
  }
}

template <int WIDTH, class T>
__device__ __forceinline__ void store_group(T* chunk, int first, int size, const float (&values)[multi_tensor_group]) {
  using G = Group<WIDTH>;
  constexpr int in_word = Word<T>::count;
  if (G::is_whole(chunk, first, size)) {
#pragma unroll
    for (int i = 0; i < G::vectors; ++i) {
      VectorWords<WIDTH, T> words;
#pragma unroll
      for (int word = 0; word < WIDTH / in_word; ++word) {
        float parts[in_word];
#pragma unroll
        for (int j = 0; j < in_word; ++j) parts[j] = values[i * WIDTH + word * in_word + j];
        reinterpret_cast<uint32_t*>(&words)[word] = Word<T>::pack(parts);
      }
      store_words<Cache::streamed>(chunk + first + i * G::stride, words);
    }
  } else {
#pragma unroll
    for (int i = 0; i < multi_tensor_group; ++i)
      if (const int element = G::element(first, i); element < size) chunk[element] = from_float<T>(values[i]);
  }
}

// What a thread adds up of a whole chunk at an aligned address: all of its vectors are asked for at once, the elements
// come in the order of load_group's steps.
template <class T>
struct WholeChunk {
  using G = Group<Packed<T>::count>;
  static constexpr int groups = multi_tensor_chunk / (multi_tensor_threads * multi_tensor_group);
  Packed<T> held[groups][G::vectors];

  __device__ __forceinline__ explicit WholeChunk(const T* elements) {
#pragma unroll
    for (int i = 0; i < groups; ++i) {
      const T* group = elements + i * multi_tensor_threads * multi_tensor_group + G::first();
#pragma unroll
      for (int j = 0; j < G::vectors; ++j) held[i][j] = load_packed<Cache::streamed>(group + j * G::stride);
    }
  }
  template <class Body>
  __device__ __forceinline__ void for_each_group(Body body) const {
#pragma unroll
    for (int i = 0; i < groups; ++i) {
      float values[multi_tensor_group];
#pragma unroll
      for (int j = 0; j < multi_tensor_group; ++j)
        values[j] = held[i][j / Packed<T>::count].at(j % Packed<T>::count);
      body(values);
    }
  }
};

inline int64_t chunks_of(int64_t size) { return divide_up(size, multi_tensor_chunk); }

// Calls start(table, blocks) for as many tables as the lists need; tensors of size 0 are left out.
template <int LISTS, class Start>
int for_each_table(const int64_t* const (&lists)[LISTS], const int64_t* sizes, int64_t count, Start start) {
  using Table = TensorTable<LISTS>;
  Table table;
  table.count = 0;
  int64_t blocks = 0;
  const auto flush = [&] {
    const int error = table.count == 0 ? static_cast<int>(cudaSuccess) : start(table, blocks);
    table.count = 0;
    blocks = 0;
    return error;
  };
  for (int64_t tensor = 0; tensor < count; ++tensor) {
    if (sizes[tensor] == 0) continue;
    if (table.count == Table::capacity || blocks + chunks_of(sizes[tensor]) > INT32_MAX) {
      if (const int error = flush()) return error;
    }
    for (int list = 0; list < LISTS; ++list)
      table.addresses[list][table.count] = lists[list] == nullptr ? 0 : lists[list][tensor];
    blocks += chunks_of(sizes[tensor]);
    table.sizes[table.count] = sizes[tensor];
    table.end_block[table.count++] = static_cast<int32_t>(blocks);
  }
  return flush();
}

}  // namespace k2::cuda
