// Asking for memory before it is needed. The hardware follows long streams, but loses them at rows that are walked
// twice and at heads with gaps between them; there a hint a row ahead is worth a fifth (RMSNorm bf16: 80 to 97 % of
// copy bandwidth) to two thirds (rotary bf16: 63 to 105 %). It also stops at the end of a page, and where a step takes
// as long as its memory, a hint some lines ahead lets the two overlap (SwiGLU bf16, one thread: a seventh).
#pragma once

#include <cstdint>

#include "simd.h"

namespace k2::cpu::K2_ISA {

// The cache line of p[ahead], which need not exist: a prefetch never faults.
template <class T>
inline void prefetch(const T* p, int64_t ahead) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// All lines of p[ahead] to p[ahead + length - 1].
template <class T>
inline void prefetch(const T* p, int64_t ahead, int64_t length) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < length; i += kLine) prefetch(p, ahead + i);
}

// What a step over the lanes at p will want `ahead` elements later, in another row.
template <class T, class Lanes>
inline void prefetch_row(const T* p, int64_t ahead, Lanes) {
  if constexpr (Lanes::kWhole) prefetch(p, ahead, Lanes::kLength);
  else prefetch(p, ahead);
}

// What a step over the lanes at p will want sixteen lines later in a stream that is walked once.
template <class T, class Lanes>
inline void prefetch_stream(const T* p, Lanes) {
  constexpr int64_t kAhead = 1024 / sizeof(T);
  if constexpr (Lanes::kWhole) prefetch(p, kAhead, Lanes::kLength);
}

}  // namespace k2::cpu::K2_ISA
