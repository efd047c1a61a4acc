// Sixteen lanes as a plain array, for every other processor; the compiler vectorises the loops. See simd.h.
#pragma once

#include <cmath>

namespace k2::cpu::K2_ISA {

struct Vec {
  float lane[kLanes];
};

template <class Function>
inline Vec each(Function function) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = function(i);
  return result;
}

#ifdef __FP_FAST_FMAF
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// Without a hardware fma the C library's emulation would cost more than the rounding it saves.
inline float multiply_add(float a, float b, float c) {
  if constexpr (kFusedMultiplyAdd) return __builtin_fmaf(a, b, c);
  else return a * b + c;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline Vec splat(float x) { return each([=](int) { return x; }); }
inline Vec operator-(Vec a) { return each([&](int i) { return -a.lane[i]; }); }
inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return multiply_add(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Vec fms(Vec a, Vec b, Vec c) { return fma(a, b, -c); }
inline Vec min(Vec a, Vec b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Vec max(Vec a, Vec b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline Vec sqrt(Vec a) { return each([&](int i) { return __builtin_sqrtf(a.lane[i]); }); }

inline Vec choose(Full, Vec a, Vec) { return a; }
inline Vec choose(Part lanes, Vec a, Vec b) {
  return each([&](int i) { return i < lanes.count ? a.lane[i] : b.lane[i]; });
}

// Two steps, of which only the second can round, as in simd_avx2.h.
inline Vec scale_by_power_of_two(Vec p, Vec /*n*/, Vec shifted) {
  return each([&](int i) {
    const int32_t n = static_cast<int32_t>(as_bits(shifted.lane[i])) - static_cast<int32_t>(as_bits(12582912.0f));
    const int32_t first = n >> 1;
    const float once = p.lane[i] * as_float(static_cast<uint32_t>(first + 127) << 23);
    return once * as_float(static_cast<uint32_t>(n - first + 127) << 23);
  });
}

template <class Fold>
inline float fold(Vec a, Fold both) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] = both(a.lane[i], a.lane[i + half]);
  return a.lane[0];
}
inline float sum(Vec a) { return fold(a, [](float x, float y) { return x + y; }); }
inline float max(Vec a) { return fold(a, [](float x, float y) { return x > y ? x : y; }); }

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  if (magnitude >= 0x0400) return as_float(sign | (magnitude + ((127 - 15) << 10)) << 13);  // normal
  return as_float(sign | as_bits(static_cast<float>(magnitude) * 0x1p-24f));                // subnormal, zero
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {  // the rounding of simd_avx512.h
  const uint32_t u = as_bits(x);
  to->bits = static_cast<uint16_t>(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float x, Float16* to) {
  const uint32_t u = as_bits(x), magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN
  else if (magnitude >= 0x477ff000) half = 0x7c00;                        // 65520 and above: infinity
  else if (magnitude < 0x38800000) half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // 0.5 ends at 2^-24 too
  else half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  to->bits = static_cast<uint16_t>(half | (u >> 16 & 0x8000));
}

template <class T>
inline Vec load(const T* p, Full) {
  return each([&](int i) { return widen(p[i]); });
}
template <class T>
inline Vec load(const T* p, Part lanes) {
  Vec result = splat(0.0f);
  for (int i = 0; i < lanes.count; ++i) result.lane[i] = widen(p[i]);
  return result;
}
template <class T>
inline void store(T* p, Vec a, Full) {
  for (int i = 0; i < kLanes; ++i) narrow(a.lane[i], p + i);
}
template <class T>
inline void store(T* p, Vec a, Part lanes) {
  for (int i = 0; i < lanes.count; ++i) narrow(a.lane[i], p + i);
}

template <class T>
inline void stream(T* p, Vec a) {
  store(p, a, Full{});
}
inline void fence() {}

inline void split_pairs(Vec low, Vec high, Vec& even, Vec& odd) {
  for (int i = 0; i < kLanes / 2; ++i) {
    even.lane[i] = low.lane[2 * i], odd.lane[i] = low.lane[2 * i + 1];
    even.lane[i + 8] = high.lane[2 * i], odd.lane[i + 8] = high.lane[2 * i + 1];
  }
}
inline void join_pairs(Vec even, Vec odd, Vec& low, Vec& high) {
  for (int i = 0; i < kLanes / 2; ++i) {
    low.lane[2 * i] = even.lane[i], low.lane[2 * i + 1] = odd.lane[i];
    high.lane[2 * i] = even.lane[i + 8], high.lane[2 * i + 1] = odd.lane[i + 8];
  }
}

struct SquareSum {
  double lane[kLanes];
};
inline SquareSum no_squares() { return {}; }
inline void add_squares(SquareSum& to, Vec a) {
  for (int i = 0; i < kLanes; ++i) to.lane[i] += static_cast<double>(a.lane[i]) * a.lane[i];
}
// Thirty-two values in two sums, in the orders of simd_avx512.h.
template <class T>
inline void add_squares(SquareSum& one, SquareSum& other, const T* p) {
  add_squares(one, load(p, Full{}));
  add_squares(other, load(p + kLanes, Full{}));
}
inline void add_squares(SquareSum& one, SquareSum& other, const BFloat16* p) {
  constexpr int kHalf = kLanes / 2;
  Vec even, odd;
  split_pairs(load(p, Full{}), load(p + kLanes, Full{}), even, odd);
  for (int i = 0; i < kHalf; ++i) {
    one.lane[i] += static_cast<double>(even.lane[i]) * even.lane[i];
    one.lane[i + kHalf] += static_cast<double>(odd.lane[i]) * odd.lane[i];
    other.lane[i] += static_cast<double>(even.lane[i + kHalf]) * even.lane[i + kHalf];
    other.lane[i + kHalf] += static_cast<double>(odd.lane[i + kHalf]) * odd.lane[i + kHalf];
  }
}
inline void lanes_of(const SquareSum& squares, double (&lane)[kLanes]) { std::memcpy(lane, squares.lane, sizeof lane); }

}  // namespace k2::cpu::K2_ISA
