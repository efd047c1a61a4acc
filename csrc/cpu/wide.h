// Two vectors in one step. bf16 needs it: neighbours are dear to widen to fp32 and to narrow again, but of thirty-two in
// a row the even ones are the low halves of 32-bit words and the odd ones the high halves, parted and joined without a
// shuffle. An operation that treats every element alike, or sums them, need not know which vector holds which.
#pragma once

#include <type_traits>

#include "simd.h"

namespace k2::cpu::K2_ISA {

struct Vec2 {
  Vec one, other;

  Vec2() = default;
  Vec2(Vec both) : one(both), other(both) {}
  Vec2(Vec first, Vec second) : one(first), other(second) {}
};

inline Vec2 operator-(Vec2 a) { return {-a.one, -a.other}; }
inline Vec2 operator+(Vec2 a, Vec2 b) { return {a.one + b.one, a.other + b.other}; }
inline Vec2 operator-(Vec2 a, Vec2 b) { return {a.one - b.one, a.other - b.other}; }
inline Vec2 operator*(Vec2 a, Vec2 b) { return {a.one * b.one, a.other * b.other}; }
inline Vec2 operator/(Vec2 a, Vec2 b) { return {a.one / b.one, a.other / b.other}; }
inline Vec2 fma(Vec2 a, Vec2 b, Vec2 c) { return {fma(a.one, b.one, c.one), fma(a.other, b.other, c.other)}; }
inline Vec2 fms(Vec2 a, Vec2 b, Vec2 c) { return {fms(a.one, b.one, c.one), fms(a.other, b.other, c.other)}; }
inline Vec2 min(Vec2 a, Vec2 b) { return {min(a.one, b.one), min(a.other, b.other)}; }
inline Vec2 max(Vec2 a, Vec2 b) { return {max(a.one, b.one), max(a.other, b.other)}; }

// The lanes of such a step.
struct Twice {
  static constexpr bool kWhole = true;
  static constexpr int kLength = 2 * kLanes;
};

template <class T>
inline Vec2 load(const T* p, Twice) {
  Vec2 result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    load_pairs(p, result.one, result.other);
  } else {
    result.one = load(p, Full{});
    result.other = load(p + kLanes, Full{});
  }
  return result;
}

// load's counterpart. kStreaming: non-temporal, for addresses that are multiples of 64 bytes.
template <bool kStreaming, class T>
inline void put_twice(T* p, Vec2 values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    put_pairs<kStreaming>(p, values.one, values.other);
  } else if constexpr (kStreaming) {
    stream(p, values.one);
    stream(p + kLanes, values.other);
  } else {
    store(p, values.one, Full{});
    store(p + kLanes, values.other, Full{});
  }
}

template <class T>
inline void store(T* p, Vec2 values, Twice) {
  put_twice<false>(p, values);
}

// Elements of another type beside such of type T, in the order of T.
template <class T, class Lanes, class Other>
inline auto load_beside(const Other* p, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, Twice> && std::is_same_v<T, BFloat16>) {
    Vec2 result;
    load_pairs(p, result.one, result.other);
    return result;
  } else {
    return load(p, lanes);
  }
}
template <class T, class Lanes, class Other, class V>
inline void store_beside(Other* p, V value, Lanes lanes) {
  if constexpr (!std::is_same_v<Lanes, Twice>) store(p, value, lanes);
  else if constexpr (std::is_same_v<T, BFloat16>) put_pairs<false>(p, value.one, value.other);
  else store(p, value, lanes);
}

// to += a * b; what comes one vector at a time goes into the first.
inline void add_product(Vec2& to, Vec2 a, Vec2 b) { to = fma(a, b, to); }
inline void add_product(Vec2& to, Vec a, Vec b) { to.one = fma(a, b, to.one); }

// Calls body(i, lanes) over [0, length): in steps of two vectors (Twice), then as for_lanes does.
template <class Body>
inline void for_twice_lanes(int64_t length, Body&& body) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) body(i, Twice{});
  for_lanes(length - i, [&](int64_t rest, auto lanes) { body(i + rest, lanes); });
}

// The same where T is kept in 16 bits; fp32 goes by one vector, which is a cache line.
template <class T, class Body>
inline void for_steps_of(int64_t length, Body&& body) {
  if constexpr (sizeof(T) < sizeof(float)) for_twice_lanes(length, body);
  else for_lanes(length, body);
}

}  // namespace k2::cpu::K2_ISA
