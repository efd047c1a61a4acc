// Sixteen fp32 lanes, whatever the processor: the only vocabulary the CPU kernels are written in.
//
// Every kernel file is compiled once per instruction set (setup.py) into the namespace k2::cpu::K2_ISA, and
// bindings.cpp picks one set when the module loads. The lane count, the order of every reduction, the rounding to bf16
// and fp16 and the polynomials are the same in all of them, and every step below is correctly rounded, so AVX2 and
// AVX-512 give equal bits (the portable set too, on processors whose compiler has a hardware fma).
//
// In:  memory of float, BFloat16 or Float16, any alignment.  Out: `Vec`, sixteen floats.
// Each simd_*.h defines Vec and its operations; this file adds what is built from them. All of it must stay inside
// K2_ISA: an inline function shared between instruction sets would be merged by the linker into one of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../ops.h"

namespace k2::cpu {
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
}  // namespace k2::cpu

namespace k2::cpu::K2_ISA {
constexpr int kLanes = 16;

// How many lanes a load or store touches, from the first: all, or the count of a short last step. Lanes beyond read as
// 0.
struct Full {
  static constexpr bool kWhole = true;
};
struct Part {
  static constexpr bool kWhole = false;
  int count;  // 1 to kLanes - 1
};
}  // namespace k2::cpu::K2_ISA

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace k2::cpu::K2_ISA {

// e^x to 1 ulp for x <= 89 (infinity above 88.73), the range that softmax and sigmoid need: x = n ln2 + r, |r| <= ln2 /
// 2, e^r by a degree-6 minimax polynomial (relative error 0.05 half-ulps, fitted by Lawson's iteration), times 2^n with
// gradual underflow. Below -104 the result is 0; NaN passes.
inline Vec exp(Vec x) {
  x = max(splat(-104.0f), x);              // max returns its second argument for NaN
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), shifter);
  const Vec n = shifted - shifter;
  Vec r = fma(n, splat(-0.693145751953125f), x);  // ln2 in two parts; n times the first part is exact
  r = fma(n, splat(-1.42860677e-6f), r);
  Vec p = fma(splat(0x1.6a23d0p-10f), r, splat(0x1.123a20p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p, r * r, r);
  return scale_by_power_of_two(p + splat(1.0f), n, shifted);
}

// 1 / (1 + e^-x); 0 where e^-x overflows.
inline Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(min(splat(89.0f), -x))); }

// Thirty-two values in a row as sixteen pairs (even, odd), and back; bf16 has its own where that is cheaper. kStreaming:
// non-temporal, for addresses that are multiples of 64 bytes.
template <class T>
inline void load_pairs(const T* p, Vec& even, Vec& odd) {
  split_pairs(load(p, Full{}), load(p + kLanes, Full{}), even, odd);
}
template <bool kStreaming, class T>
inline void put_pairs(T* p, Vec even, Vec odd) {
  Vec low, high;
  join_pairs(even, odd, low, high);
  if constexpr (kStreaming) {
    stream(p, low);
    stream(p + kLanes, high);
  } else {
    store(p, low, Full{});
    store(p + kLanes, high, Full{});
  }
}

// Calls body(i, lanes) over [0, length) in steps of kLanes: lanes is Full but for a short last step. The body is
// instantiated twice, so that full steps carry no masks.
template <class Body>
inline void for_lanes(int64_t length, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) body(i, Full{});
  if (i < length) body(i, Part{static_cast<int>(length - i)});
}

// A sum over [0, length) that add(i, lanes, to) gathers into `to`: four running sums, closed every kSumBlock elements,
// which keeps the error of long rows near that of a pairwise sum.
constexpr int64_t kSumBlock = 2048;

template <class Add>
inline float blocked_sum(int64_t length, Add&& add) {
  Vec total = splat(0.0f);
  for (int64_t begin = 0; begin < length; begin += kSumBlock) {
    const int64_t end = length - begin < kSumBlock ? length : begin + kSumBlock;
    Vec parts[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
      for (int part = 0; part < 4; ++part) add(i + part * kLanes, Full{}, parts[part]);
    for_lanes(end - i, [&](int64_t rest, auto lanes) { add(i + rest, lanes, parts[0]); });
    total = total + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
  return sum(total);
}

// A truth value known to the compiler.
template <bool kIs>
struct Truth {
  static constexpr bool value = kIs;
};
template <class Body>
inline void with_truth(bool is, Body&& body) {
  if (is) body(Truth<true>{});
  else body(Truth<false>{});
}

// Runs body(T{}) with the element type that a DType names.
template <class Body>
inline void with_type(DType dtype, Body&& body) {
  if (dtype == DType::float32) body(float{});
  else if (dtype == DType::bfloat16) body(BFloat16{});
  else body(Float16{});
}

}  // namespace k2::cpu::K2_ISA
