// Work in pieces over OpenMP threads. What a piece is depends on shapes alone, and pieces share nothing, so results do
// not depend on the number of threads.
//
// The extension uses whichever OpenMP runtime the process has: imported after torch it resolves to torch's libgomp and
// shares its threads, which is why k2_megatron imports torch first. Two runtimes would fight over the cores.
#pragma once

#include <cstdint>

#include "simd.h"

namespace k2::cpu::K2_ISA {

// Below this many bytes of memory traffic a call runs on the calling thread: at 10 to 15 GB/s a core moves this much in
// about the time that waking a second thread takes.
constexpr int64_t kBytesWorthThreads = 128 << 10;

// Calls work(first, last) for consecutive ranges that cover [0, pieces); bytes is the call's whole memory traffic.
template <class Work>
inline void parallel_ranges(int64_t pieces, int64_t bytes, int threads, Work&& work) {
  if (pieces <= 0) return;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1 || bytes < kBytesWorthThreads) {
    work(int64_t{0}, pieces);
    fence();
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int range = 0; range < threads; ++range) {
    work(pieces * range / threads, pieces * (range + 1) / threads);
    fence();
  }
}

}  // namespace k2::cpu::K2_ISA
