// Kernels with one mistake each, to see that the emulation reports it. Named by the mistake; `correct` has none.
#include <exception>
#include <string>

#include "primitives.cuh"

namespace k2::cuda {
namespace {

enum class Mistake : int {
  none,
  missing_barrier,
  divergent_barrier,
  different_barriers,
  divergent_collective,
  lane_has_left,
  partial_mask,
  early_exit,
  copy_not_waited_for,
  wrong_group_waited_for,
  misaligned,
  shared_beyond_end,
  global_beyond_end,
  partial_warp
};

// Each thread passes its number on to its neighbour, through shared memory.
__global__ void exchange(float* out, Mistake mistake) {
  K2_SHARED(float, numbers, 64);
  const int self = threadIdx.x, neighbour = (self + 33) % 64;
  if (mistake == Mistake::early_exit && self == 5) return;
  numbers[self + (mistake == Mistake::shared_beyond_end && self == 63 ? 2 : 0)] = static_cast<float>(self);
  if (mistake == Mistake::divergent_barrier) {
    if (self < 32) __syncthreads();
  } else if (mistake == Mistake::different_barriers && self % 2 == 1) {
    __syncthreads();
  } else if (mistake != Mistake::missing_barrier) {
    __syncthreads();
  }
  out[self + (mistake == Mistake::global_beyond_end && self == 63 ? 1 : 0)] = numbers[neighbour];
}

__global__ void collective(float* out, Mistake mistake) {
  const int self = threadIdx.x;
  if (mistake == Mistake::lane_has_left && self == 40) return;
  float value = static_cast<float>(self % 32);
  const unsigned mask = mistake == Mistake::partial_mask ? 0xFFFFu : full_warp;
  if (mistake != Mistake::divergent_collective || self % 32 < 16) value = __shfl_xor_sync(mask, value, 1);
  out[self] = value;
}

__global__ void copies(const float* in, float* out, Mistake mistake) {
  auto* slots = static_cast<float*>(dynamic_shared_memory());
  float* mine = slots + 8 * threadIdx.x;
  copy_async_16_bytes(mine, in + 4 * threadIdx.x);
  close_copy_group();
  copy_async_16_bytes(mine + 4, in + 4 * threadIdx.x + (mistake == Mistake::misaligned ? 1 : 0));
  close_copy_group();
  if (mistake == Mistake::wrong_group_waited_for) wait_for_copies<1>();
  else if (mistake != Mistake::copy_not_waited_for) wait_for_copies<0>();
  out[threadIdx.x] = mine[0] + mine[4];
}

// A mistake that one order of the blocks hides: the first reads what the second overwrites.
__global__ void neighbours(const float* in, float* out) {
  if (blockIdx.x == 0) out[threadIdx.x] = out[threadIdx.x + 32];
  else out[threadIdx.x + 32] = in[threadIdx.x];
}

}  // namespace
}  // namespace k2::cuda

// Runs one kernel; returns the emulation's message, or "" if it saw nothing.
extern "C" const char* run_faulty(int kernel, int mistake, const float* in, float* out) {
  using namespace k2::cuda;
  static std::string message;
  const auto chosen = static_cast<Mistake>(mistake);
  message.clear();
  try {
    const dim3 threads(chosen == Mistake::partial_warp ? 63 : 64);
    if (kernel == 0) launch(exchange, 1, threads, 0, nullptr, out, chosen);
    if (kernel == 1) launch(collective, 1, threads, 0, nullptr, out, chosen);
    if (kernel == 2) launch(copies, 1, threads, 64 * 32, nullptr, in, out, chosen);
    if (kernel == 3) launch(neighbours, 2, dim3(32), 0, nullptr, in, out);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
