// What every kernel here is made of: conversions, 16-byte accesses, asynchronous copies, reductions in a fixed order,
// launches. The only file that knows whether nvcc compiles for a GPU or g++ for the emulation.
#pragma once

#ifdef K2_EMULATION
#include "emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "ops.h"

namespace k2::cuda {

constexpr int warp_threads = 32;
constexpr unsigned full_warp = 0xFFFFFFFFu;
constexpr float log2_of_e = 1.4426950408889634f;

// ---- Conversions: fp32 is what we compute in; storing rounds to nearest even, once.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  else return __float2half_rn(value);
}

// ---- 32 bits of a tensor: two elements of bf16 or fp16, one of fp32.
template <class T>
struct Word {
  static constexpr int count = 4 / sizeof(T);
  using Element = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;  // the bits of one
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

  template <class Value>
  __device__ __forceinline__ static Value as(const uint32_t& bits) {
    return reinterpret_cast<const Value&>(bits);
  }
  template <class Value>
  __device__ __forceinline__ static uint32_t bits_of(const Value& value) {
    return reinterpret_cast<const uint32_t&>(value);
  }
  __device__ __forceinline__ static void unpack(uint32_t bits, float (&values)[count]) {
    if constexpr (std::is_same_v<T, float>) {
      values[0] = as<float>(bits);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 both = __half22float2(as<__half2>(bits));
      values[0] = both.x, values[1] = both.y;
    } else {
      values[0] = as<float>(bits << 16), values[1] = as<float>(bits & 0xFFFF0000u);
    }
  }
  __device__ __forceinline__ static uint32_t pack(const float (&values)[count]) {
    if constexpr (std::is_same_v<T, float>) return bits_of(values[0]);
    else if constexpr (std::is_same_v<T, __half>) return bits_of(__floats2half2_rn(values[0], values[1]));
    else return bits_of(__floats2bfloat162_rn(values[0], values[1]));
  }
};

// ---- 16 bytes of a tensor, the widest access of a thread. Kept as the words that memory gives: elements of 16 bits each
// the compiler takes apart where they arrive, and there it waits for them, before the next load is asked for.
template <class T>
struct alignas(16) Packed {
  static constexpr int count = 16 / sizeof(T), in_word = Word<T>::count;
  uint32_t words[4];

  __device__ __forceinline__ float at(int j) const {
    float values[in_word];
    Word<T>::unpack(words[j / in_word], values);
    return values[j % in_word];
  }
  // The bits of element j alone, of a row that is not aligned.
  __device__ __forceinline__ void set_bits(int j, typename Word<T>::Element bits) {
    words[j / in_word] |= static_cast<uint32_t>(bits) << (j % in_word * 16);
  }
  __device__ __forceinline__ typename Word<T>::Element bits(int j) const {
    return static_cast<typename Word<T>::Element>(words[j / in_word] >> (j % in_word * 16));
  }
};

template <class T>
__device__ __forceinline__ Packed<T> pack(const float (&values)[Packed<T>::count]) {
  constexpr int in_word = Packed<T>::in_word;
  Packed<T> packed;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float parts[in_word];
#pragma unroll
    for (int j = 0; j < in_word; ++j) parts[j] = values[word * in_word + j];
    packed.words[word] = Word<T>::pack(parts);
  }
  return packed;
}

// cached: read again soon (gamma, tables). streamed: evicted first, it would only push others out of L2.
enum class Cache { cached, streamed };

// As one access: Words is uint4 for 16 bytes, uint2 for 8.
template <class Words, Cache POLICY = Cache::cached>
__device__ __forceinline__ Words load_words(const void* address) {
  const auto* words = static_cast<const Words*>(address);
#ifdef K2_EMULATION
  return emulation::load(words);
#else
  if constexpr (POLICY == Cache::streamed) return __ldcs(words);
  else return *words;
#endif
}

template <Cache POLICY = Cache::cached, class Words>
__device__ __forceinline__ void store_words(void* address, Words value) {
  auto* words = static_cast<Words*>(address);
#ifdef K2_EMULATION
  emulation::store(words, value);
#else
  if constexpr (POLICY == Cache::streamed) __stcs(words, value);
  else *words = value;
#endif
}

template <Cache POLICY = Cache::cached>
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  return load_words<uint4, POLICY>(address);
}

template <Cache POLICY = Cache::cached, class T>
__device__ __forceinline__ Packed<T> load_packed(const T* address) {
  const uint4 words = load_16_bytes<POLICY>(address);
  return reinterpret_cast<const Packed<T>&>(words);
}

template <Cache POLICY = Cache::cached, class T>
__device__ __forceinline__ void store_packed(T* address, const Packed<T>& packed) {
  store_words<POLICY>(address, reinterpret_cast<const uint4&>(packed));
}

// Vector `index` of a row of `columns` elements. Not ALIGNED: the same elements to the same thread, one at a time, so
// that results do not depend on alignment; what lies beyond the row reads as zero and is not written.
template <bool ALIGNED, Cache POLICY = Cache::cached, class T>
__device__ __forceinline__ Packed<T> load_of_row(const T* row, int index, int columns) {
  constexpr int width = Packed<T>::count;
  if constexpr (ALIGNED) {
    return load_packed<POLICY>(row + static_cast<int64_t>(index) * width);
  } else {
    const auto* elements = reinterpret_cast<const typename Word<T>::Element*>(row);
    Packed<T> packed{};
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const int column = index * width + j;
      if (column < columns) packed.set_bits(j, elements[column]);
    }
    return packed;
  }
}

template <bool ALIGNED, Cache POLICY = Cache::cached, class T>
__device__ __forceinline__ void store_to_row(T* row, int index, int columns, const Packed<T>& packed) {
  constexpr int width = Packed<T>::count;
  if constexpr (ALIGNED) {
    store_packed<POLICY>(row + static_cast<int64_t>(index) * width, packed);
  } else {
    auto* elements = reinterpret_cast<typename Word<T>::Element*>(row);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const int column = index * width + j;
      if (column < columns) elements[column] = packed.bits(j);
    }
  }
}

// COUNT consecutive floats whose address is aligned to min(COUNT * 4, 16) bytes.
template <int COUNT>
__device__ __forceinline__ void load_floats(const float* address, float (&values)[COUNT]) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const Packed<float> packed = load_packed(address + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = packed.at(j);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = address[i];
  }
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// ---- Shared memory. Declared through these two, so that the emulation can poison it and guard its ends.
#ifdef K2_EMULATION
#define K2_SHARED(TYPE, NAME, COUNT) \
  static char NAME##_declaration;    \
  TYPE* NAME = static_cast<TYPE*>(emulation::block().shared.array(&NAME##_declaration, sizeof(TYPE) * (COUNT)))
#else
#define K2_SHARED(TYPE, NAME, COUNT) __shared__ TYPE NAME[COUNT]
#endif

__device__ __forceinline__ void* dynamic_shared_memory() {
#ifdef K2_EMULATION
  return emulation::block().shared.dynamic();
#else
  extern __shared__ uint4 k2_dynamic_shared[];
  return k2_dynamic_shared;
#endif
}

// 16 bytes from global to shared memory, past the registers. The copy is complete, and visible to the thread that asked
// for it, after it has waited for the group.
__device__ __forceinline__ void copy_async_16_bytes(void* shared, const void* global) {
#ifdef K2_EMULATION
  emulation::copy_async(shared, global, 16);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void close_copy_group() {
#ifdef K2_EMULATION
  emulation::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int GROUPS_LEFT>
__device__ __forceinline__ void wait_for_copies() {
#ifdef K2_EMULATION
  emulation::copy_wait(GROUPS_LEFT);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#endif
}

// ---- Arithmetic for tensors of type T. What bf16 and fp16 round away anyway may be approximate: relative error about
// 2^-22, results below 2^-126 become zero. fp32 would show it.
__device__ __forceinline__ float approximate_exp2(float x) {
#ifdef K2_EMULATION
  return emulation::ex2_approx(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
#ifdef K2_EMULATION
  return emulation::rcp_approx(x);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

template <class T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  else return approximate_exp2(x * log2_of_e);
}

template <class T>
__device__ __forceinline__ float reciprocal(float x) {
  if constexpr (std::is_same_v<T, float>) return __frcp_rn(x);
  else return approximate_reciprocal(x);
}

// Two roundings. Once a row, so that it need not be rsqrtf's two units, which the fp32 rstd of every dtype would show.
__device__ __forceinline__ float reciprocal_root(float x) { return __frcp_rn(__fsqrt_rn(x)); }

// ---- Reductions. Butterfly order: the same bits in every lane, in every run.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = warp_threads / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(full_warp, value, distance));
  return value;
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Sum over a block's threads in x, of which there are whole warps; every thread gets it. One barrier. `scratch` holds
// one value a warp; a second call must be given other scratch, or be separated from this one by a barrier.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  value = warp_reduce(value, Sum{});
  const int warps = blockDim.x / warp_threads, warp = threadIdx.x / warp_threads, lane = threadIdx.x % warp_threads;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? scratch[lane] : T{0}, Sum{});
}

// ---- Host side.
template <class T>
__host__ __device__ constexpr T divide_up(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}
inline int whole_warps(int64_t threads) {
  return static_cast<int>(divide_up<int64_t>(threads, warp_threads)) * warp_threads;
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>) with the element type of `dtype`.
template <class Body>
int with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(TypeTag<float>{});
    case DType::bfloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::float16:
      return body(TypeTag<__half>{});
  }
  return cudaErrorInvalidValue;
}

// What the runtime refused stays its last error until somebody asks, and would be taken for the next launch's.
inline int refused(cudaError_t error) {
  cudaGetLastError();
  return error;
}

// Starts a kernel on the caller's stream and reports what the launch itself says (a cudaError_t, 0 = success). More
// blocks than a grid can have (2^31 - 1) are refused here: a dim3 would drop the upper bits.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks));
#ifdef K2_EMULATION
  static_cast<void>(stream);
  if (k2_launch_observer != nullptr)
    emulation::show_launch(k2_launch_observer, kernel, grid, threads, shared_bytes, arguments...);
  else emulation::launch(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
#else
  if (shared_bytes > 0) {  // with its static memory beyond 48 KiB it must be told once a device; again costs nothing
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return refused(error);
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#endif
}

}  // namespace k2::cuda
