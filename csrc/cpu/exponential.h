// e^x, as exact as its result is kept: to 1 ulp of fp32, to about 1 ulp for sums of many, or well below the rounding of
// bf16 and fp16. All of them: x = n ln2 + r, |r| <= ln2 / 2, e^r by a minimax polynomial (of least relative error, by
// Lawson's iteration), times 2^n with gradual underflow; for x <= 89 (infinity above 88.73), the range that softmax and
// sigmoid need. Below -104 the result is 0; NaN passes.
#pragma once

#include "wide.h"

namespace k2::cpu::K2_ISA {

struct Reduced {
  Vec r, n, shifted;
};

// kExact: ln2 in two parts, n times the first of which is exact; else r is off by n times 2e-9.
template <bool kExact>
inline Reduced reduced(Vec x) {
  x = max(splat(-104.0f), x);              // max returns its second argument for NaN
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), shifter), n = shifted - shifter;
  if constexpr (kExact)
    return {fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145751953125f), x)), n, shifted};
  else
    return {fma(n, splat(-0.69314718f), x), n, shifted};
}

// Degree 6, 0.05 half-ulps.
inline Vec exp(Vec x) {
  const auto [r, n, shifted] = reduced<true>(x);
  Vec p = fma(splat(0x1.6a23d0p-10f), r, splat(0x1.123a20p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p, r * r, r);
  return scale_by_power_of_two(p + splat(1.0f), n, shifted);
}

// Degree 5, 2^-23.4, with errors of either sign that cancel in a sum of many. Without a hardware fma the product of n and
// ln2 would be rounded before x is subtracted: off by 16 units where x is 60.
inline Vec exp_for_sum(Vec x) {
  const auto [r, n, shifted] = reduced<!kFusedMultiplyAdd>(x);
  Vec p = fma(splat(0x1.0fa1eep-7f), r, splat(0x1.573a1cp-5f));
  p = fma(p, r, splat(0x1.555a7cp-3f));
  p = fma(p, r, splat(0x1.fffdc6p-2f));
  p = fma(p, r, splat(0x1.fffff6p-1f));
  return scale_by_power_of_two(fma(p, r, splat(1.0f)), n, shifted);
}

// Degree 4, 2^-18, an eightieth of fp16's rounding.
inline Vec short_exp(Vec x) {
  const auto [r, n, shifted] = reduced<false>(x);
  Vec p = fma(splat(0x1.541456p-5f), r, splat(0x1.57ce96p-3f));
  p = fma(p, r, splat(0x1.0003f4p-1f));
  p = fma(p, r, splat(0x1.fffba8p-1f));
  return scale_by_power_of_two(fma(p, r, splat(1.0f)), n, shifted);
}

// For a result that is stored as T.
template <class T>
inline Vec exp_for(Vec x) {
  if constexpr (sizeof(T) < sizeof(float)) return short_exp(x);
  else return exp(x);
}
template <class T>
inline Vec2 exp_for(Vec2 x) {
  return {exp_for<T>(x.one), exp_for<T>(x.other)};
}

// 1 + e^-x: sigmoid(x) is one over it; infinity where e^-x overflows.
template <class T, class V>
inline V one_plus_exp_minus(V x) {
  return V{splat(1.0f)} + exp_for<T>(min(V{splat(89.0f)}, -x));
}

}  // namespace k2::cpu::K2_ISA
