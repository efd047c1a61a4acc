// Whether an output should bypass the caches. A normal store first reads the line it is about to overwrite; a
// non-temporal one does not, a third of a copy's traffic. But what it writes is then read back from memory, so it pays
// only for outputs too large to wait in a cache for their reader.
#pragma once

#include <cstdint>

#include "wide.h"

namespace k2::cpu::K2_ISA {

constexpr int64_t kBytesWorthStreaming = 4 << 20;

// Rows of `columns` elements at `to`, written whole and not read by the same call.
template <class T>
inline bool worth_streaming(const T* to, int64_t rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const bool whole_lines = reinterpret_cast<uintptr_t>(to) % 64 == 0 && row_bytes % 64 == 0;
  return whole_lines && rows * row_bytes >= kBytesWorthStreaming;
}

// A store that is non-temporal where kStreaming says so.
template <bool kStreaming, class T, class Lanes>
inline void put(T* to, Vec value, Lanes lanes) {
  if constexpr (kStreaming && Lanes::kWhole) stream(to, value);
  else store(to, value, lanes);
}
template <bool kStreaming, class T>
inline void put(T* to, Vec2 values, Twice) {
  put_twice<kStreaming>(to, values);
}

}  // namespace k2::cpu::K2_ISA
