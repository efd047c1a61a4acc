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
  static constexpr int kLength = kLanes;
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
