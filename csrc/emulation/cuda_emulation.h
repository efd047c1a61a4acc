// Runs CUDA kernels on the CPU, compiled by g++, so that the suite can execute every .cu where there is no GPU.
// In: the same sources as nvcc compiles, with -DK2_EMULATION. Out: the same results, or an exception that says what a
// GPU would have done wrong. primitives.cuh is the only file that knows about both worlds.
//
//   fiber.h           a CUDA thread as a stack and a switch
//   shared_memory.h   poisoned shared memory
//   block.h           scheduler: barriers, warp collectives, deadlocks, the order of things
//   intrinsics.h      device functions
//   launch_observer.h who runs the launches in the emulation's place: the tests' interpreter of PTX
//   runtime.cpp       the few host calls (last error, attributes)
//
// Caught: divergent or missing barriers, divergent collectives, reading what nobody wrote, copies not waited for,
// misaligned vector accesses; with AddressSanitizer, anything out of bounds in global, shared and local memory.
// Not seen: races between blocks beyond what the order of whole blocks shows (they run one after another, in the order
// that K2_EMULATION_ORDER names; no kernel here waits for another block), memory ordering, bank conflicts, coalescing;
// tests/kernels/ptx, which runs what nvcc makes of the same sources, sees all of these but the ordering.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <numeric>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#include "block.h"
#include "intrinsics.h"
#include "launch_observer.h"

#define threadIdx (emulation::block().current->index)
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().size)
#define gridDim (emulation::block().grid)

namespace emulation {

inline void launch(dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()>& kernel) {
  Order order(std::getenv("K2_EMULATION_ORDER"));
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  order.begin(blocks);
  // K2_EMULATION_ENDS=n: the first and the last n blocks alone, for tensors whose other rows nobody has the time for.
  const char* ends = std::getenv("K2_EMULATION_ENDS");
  const uint64_t kept = ends == nullptr ? blocks.size() : std::strtoull(ends, nullptr, 10);
  if (2 * kept < blocks.size()) blocks.erase(blocks.begin() + kept, blocks.end() - kept);
  Block& device = block();
  device.grid = grid, device.size = size;
  for (uint64_t i : blocks) {
    device.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    device.run(kernel, dynamic_bytes, order);
  }
}

}  // namespace emulation
