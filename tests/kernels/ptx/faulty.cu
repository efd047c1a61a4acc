// Kernels with one mistake each, to see that the interpreter of their PTX reports it. `right` has none.
#include <cstdint>

#define WARP 0xFFFFFFFFu

// Each thread passes a number to its neighbour in the block, through shared memory.
template <bool BARRIER, int BEYOND, bool SOME_LEAVE>
__device__ void exchange(const float* in, float* out) {
  __shared__ float numbers[64];
  const int self = threadIdx.x;
  if (SOME_LEAVE && self == 5) return;
  numbers[self] = in[self];
  if (BARRIER) __syncthreads();
  out[self] = numbers[(self + 33) % 64 + BEYOND];
}

extern "C" {

__global__ void right(const float* in, float* out) { exchange<true, 0, false>(in, out); }
__global__ void missing_barrier(const float* in, float* out) { exchange<false, 0, false>(in, out); }
__global__ void shared_beyond_end(const float* in, float* out) { exchange<true, 1, false>(in, out); }
__global__ void early_exit(const float* in, float* out) { exchange<true, 0, true>(in, out); }

__global__ void divergent_barrier(const float* in, float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void shared_never_written(const float* in, float* out) {
  __shared__ float numbers[64];
  if (threadIdx.x != 7) numbers[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x ^ 1];
}
__global__ void wrong_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, in[threadIdx.x], 1);
}
__global__ void lane_does_not_arrive(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(WARP, value, 1);
  out[threadIdx.x] = value;
}
__global__ void reads_a_stranger(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xFFFFu, value, 16);
  out[threadIdx.x] = value;
}
__global__ void off_by_one(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
__global__ void before_the_start(const float* in, float* out) { out[threadIdx.x] = in[static_cast<int>(threadIdx.x) - 1]; }
__global__ void writes_an_input(float* in, float* out) { in[threadIdx.x] = out[threadIdx.x] = 0.0f; }
__global__ void dropped_tail(const float* in, float* out) {
  if (threadIdx.x < 63) out[threadIdx.x] = in[threadIdx.x];
}
__global__ void reads_an_output(const float*, float* out) { out[threadIdx.x] += 1.0f; }
__global__ void misaligned(const float* in, float* out) {
  if (threadIdx.x < 15) *reinterpret_cast<float4*>(out + 4 * threadIdx.x) =
      *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + 1);
}
// In place, and one thread reads what another of its block writes.
__global__ void race_in_global_memory(float* in, float* out) {
  const float value = in[(threadIdx.x + 1) % 64];
  out[threadIdx.x] = value;
  in[threadIdx.x] = value + 1.0f;
}
// Two blocks write one number.
__global__ void race_of_blocks(const float* in, float* out) {
  if (threadIdx.x < 32) out[31 * blockIdx.x + threadIdx.x] = in[threadIdx.x];
}
// The barrier of the first warp is another one than the second's.
__global__ void two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
  }
}
__global__ void copy_not_waited_for(const float* in, float* out) {
  __shared__ uint4 slots[16];
  if (threadIdx.x < 16) {
    const auto slot = static_cast<unsigned>(__cvta_generic_to_shared(slots + threadIdx.x));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot), "l"(in + 4 * threadIdx.x) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(slots)[threadIdx.x];
}
__global__ void unknown_instruction(const float* in, float* out) { out[threadIdx.x] = __sinf(in[threadIdx.x]); }
}
