// A list of tensors cut into chunks of a fixed number of elements: the pieces of the multi-tensor operations.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace k2::cpu::K2_ISA {

constexpr int64_t kChunk = 1 << 16;  // elements

inline int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

inline int64_t chunks_of(const int64_t* sizes, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += chunks_of(sizes[i]);
  return total;
}

// Calls body(tensor, begin, length, chunk) for every chunk, chunks numbered through the list; bytes_per_element is the
// memory traffic of one element.
template <class Body>
inline void for_chunks(const int64_t* sizes, int64_t count, int64_t bytes_per_element, int threads, Body&& body) {
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += sizes[i];
  parallel_ranges(chunks_of(sizes, count), elements * bytes_per_element, threads, [&](int64_t first, int64_t last) {
    int64_t tensor = 0, before = 0;  // before: chunks of the tensors that precede `tensor`
    for (int64_t chunk = first; chunk < last; ++chunk) {
      while (chunk - before >= chunks_of(sizes[tensor])) before += chunks_of(sizes[tensor++]);
      const int64_t begin = (chunk - before) * kChunk, left = sizes[tensor] - begin;
      body(tensor, begin, left < kChunk ? left : kChunk, chunk);
    }
  });
}

template <class T>
inline T* tensor_at(const int64_t* addresses, int64_t index) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(addresses[index]));
}

}  // namespace k2::cpu::K2_ISA
