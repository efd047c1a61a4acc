// The device functions that the kernels call and that CUDA's headers do not give to a host compiler.
// Where the device approximates, so does the emulation: a result is off by a part of the documented error that a hash
// of the argument picks, the same for the same argument. Bounds must hold for the device, not for exact arithmetic.
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

// `exact`, off by at most `ulps` units in the last place, half of one for the rounding included.
inline float approximate(double exact, float argument, double ulps) {
  const auto nearest = static_cast<float>(exact);
  if (!std::isfinite(nearest) || nearest == 0.0f) return nearest;
  uint32_t hash;
  std::memcpy(&hash, &argument, sizeof(hash));
  hash = (hash ^ hash >> 16) * 0x7FEB352Du;
  hash = (hash ^ hash >> 15) * 0x846CA68Bu;
  hash ^= hash >> 16;
  const double part = hash / 2147483648.0 - 1.0, ulp = std::ldexp(1.0, std::ilogb(nearest) - 23);
  return static_cast<float>(exact + part * (ulps - 0.5) * ulp);
}

// PTX ISA: ex2.approx (1 at 0), rcp.approx; what lies below 2^-126 becomes zero. CUDA C++ Programming Guide,
// mathematical functions: expf, logf, rsqrtf.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }
inline float ex2_approx(float x) { return flushed(x == 0.0f ? 1.0f : approximate(std::exp2(double{x}), x, 2.0)); }
inline float rcp_approx(float x) { return flushed(approximate(1.0 / double{flushed(x)}, x, 1.0)); }
inline float expf_of_device(float x) { return x == 0.0f ? 1.0f : approximate(std::exp(double{x}), x, 2.0); }
inline float logf_of_device(float x) { return approximate(std::log(double{x}), x, 1.0); }
inline float rsqrtf_of_device(float x) { return approximate(1.0 / std::sqrt(double{x}), x, 2.0); }

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
#define expf(x) emulation::expf_of_device(x)
#define logf(x) emulation::logf_of_device(x)
#define rsqrtf(x) emulation::rsqrtf_of_device(x)
