// The fingerprint of rows of a tensor: a sum of hashes of (place, bits). Definition is in ops.h. Nothing but integers
// that wrap, so plain loops: the compiler turns them into vector code, and every instruction set gives the same sum.
#include <atomic>

#include "parallel.h"

namespace k2::cpu::K2_ISA {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr int64_t kPiece = 1 << 15;  // elements that one thread takes at once

// The output function of splitmix64.
inline uint64_t finish(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// state: (global index of the first value + 1) * golden ratio + key.
template <class Integer>
uint64_t sum_of_hashes(const Integer* values, int64_t length, uint64_t state) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint64_t place = finish(state + static_cast<uint64_t>(i) * kGolden);
    const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(values[i]));
    sum += finish(((place ^ bits) + 1) * kGolden);
  }
  return sum;
}

template <class Integer>
uint64_t sum_of_rows(const Integer* values, int64_t rows, int64_t columns, int64_t row_stride, int64_t first_index,
                     int64_t index_stride, uint64_t key, int threads) {
  const int64_t pieces = (columns + kPiece - 1) / kPiece;  // of a row
  std::atomic<uint64_t> total{0};
  parallel_ranges(rows * pieces, rows * columns * static_cast<int64_t>(sizeof(Integer)), threads,
                  [&](int64_t first, int64_t last) {
                    uint64_t sum = 0;
                    for (int64_t piece = first; piece < last; ++piece) {
                      const int64_t row = piece / pieces, begin = piece % pieces * kPiece, left = columns - begin;
                      const int64_t index = first_index + row * index_stride + begin;
                      sum += sum_of_hashes(values + row * row_stride + begin, left < kPiece ? left : kPiece,
                                           (static_cast<uint64_t>(index) + 1) * kGolden + key);
                    }
                    total += sum;
                  });
  return total;
}

}  // namespace

void fingerprint(const void* values, int64_t itemsize, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t first_index, int64_t index_stride, uint64_t key, uint64_t* sum, int threads) {
  if (row_stride == columns && index_stride == columns) {  // whole rows, one after the other: one long row
    columns *= rows;
    rows = 1;
  }
  const auto add = [&](auto integer) {
    using Integer = decltype(integer);
    *sum += sum_of_rows(static_cast<const Integer*>(values), rows, columns, row_stride, first_index, index_stride, key,
                        threads);
  };
  if (itemsize == 2) add(int16_t{});
  else if (itemsize == 4) add(int32_t{});
  else add(int64_t{});
}

}  // namespace k2::cpu::K2_ISA
