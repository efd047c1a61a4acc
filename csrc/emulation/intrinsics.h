// The device functions that the kernels call and that CUDA's headers do not give to a host compiler.
// Host arithmetic is exact where the device approximates (exp2, reciprocal): bounds are set for the device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "block.h"

namespace emulation {

inline void require_aligned(const void* address, size_t bytes) {
  const auto value = reinterpret_cast<uintptr_t>(address);
  if (value % bytes == 0) return;
  block().stop("misaligned access: " + std::to_string(bytes) + " bytes at an address that ends in " +
               std::to_string(value % 16) + " modulo 16, thread " + std::to_string(block().current->linear));
}

template <class T>
T load(const T* address) {
  require_aligned(address, sizeof(T));
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
void store(T* address, T value) {
  require_aligned(address, sizeof(T));
  std::memcpy(address, &value, sizeof(T));
}

// cp.async: copies join the open group, commit closes it, wait performs all but the newest `groups_left` groups.
inline void copy_async(void* to, const void* from, unsigned bytes) {
  require_aligned(to, bytes);
  require_aligned(from, bytes);
  Thread& thread = *block().current;
  thread.copies.push_back({to, from, bytes, thread.copy_group});
}
inline void copy_commit() { ++block().current->copy_group; }
inline void copy_wait(unsigned groups_left) {
  Thread& thread = *block().current;
  size_t kept = 0;
  for (const PendingCopy& copy : thread.copies) {
    if (copy.group + groups_left >= thread.copy_group) thread.copies[kept++] = copy;
    else std::memcpy(copy.to, copy.from, copy.bytes);
  }
  thread.copies.resize(kept);
}

}  // namespace emulation

#define EMULATION_TEXT(x) #x
#define EMULATION_LINE(x) EMULATION_TEXT(x)
#define EMULATION_SITE __FILE__ ":" EMULATION_LINE(__LINE__)

#define __syncthreads() emulation::block().block_barrier(EMULATION_SITE)
#define __syncwarp() emulation::block().warp_barrier(EMULATION_SITE)
#define __shfl_xor_sync(mask, value, bits) \
  emulation::block().exchange(mask, value, emulation::block().current->lane ^ (bits), EMULATION_SITE)
#define __shfl_sync(mask, value, lane) emulation::block().exchange(mask, value, (lane) % 32, EMULATION_SITE)

template <class T>
T __ldg(const T* address) {
  return emulation::load(address);
}
template <class T>
T __ldcs(const T* address) {
  return emulation::load(address);
}
template <class T>
void __stcs(T* address, T value) {
  emulation::store(address, value);
}

inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
