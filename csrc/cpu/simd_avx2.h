// Sixteen lanes as two AVX2 registers (with FMA and F16C). See simd.h.
#pragma once

#include <immintrin.h>

namespace k2::cpu::K2_ISA {

constexpr bool kFusedMultiplyAdd = true;

struct Vec {
  __m256 low, high;
};

inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec operator-(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec fms(Vec a, Vec b, Vec c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }

inline Vec choose(Full, Vec a, Vec) { return a; }
inline Vec choose(Part lanes, Vec a, Vec b) {
  const __m256i count = _mm256_set1_epi32(lanes.count);
  const __m256i low = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i high = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
  return {_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(high))};
}

// p * 2^n in two steps, of which only the second can round: n runs from -151 to 128, beyond one exponent's range. The
// low bits of `shifted` are n (simd.h, exp).
inline __m256 scale_half(__m256 p, __m256 shifted) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(_mm256_set1_ps(12582912.0f)));
  const __m256i first = _mm256_srai_epi32(n, 1);
  const __m256i second = _mm256_sub_epi32(n, first);
  const __m256i bias = _mm256_set1_epi32(127);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23)));
}
inline Vec scale_by_power_of_two(Vec p, Vec /*n*/, Vec shifted) {
  return {scale_half(p.low, shifted.low), scale_half(p.high, shifted.high)};
}

inline float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float max(Vec a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline __m256 widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 widen(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }

// To bf16 in the low half of each lane; the rounding of simd_avx512.h.
inline __m256i round_to_bfloat16(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i kept = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(kept, _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i quiet = _mm256_or_si256(kept, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline __m256i narrow(Vec a, BFloat16) {
  // packus interleaves 128-bit halves: (low 0-3, high 0-3, low 4-7, high 4-7); the permutation puts them in order.
  const __m256i packed = _mm256_packus_epi32(round_to_bfloat16(a.low), round_to_bfloat16(a.high));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
inline __m256i narrow(Vec a, Float16) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(a.high, kNearest), _mm256_cvtps_ph(a.low, kNearest));
}

inline Vec load(const float* p, Full) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a, Full) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
template <class Half>
inline Vec load(const Half* p, Full) {
  const __m128i* bits = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(bits), Half{}), widen(_mm_loadu_si128(bits + 1), Half{})};
}
template <class Half>
inline void store(Half* p, Vec a, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, Half{}));
}

template <class T>
inline Vec load(const T* p, Part lanes) {
  T whole[kLanes] = {};
  std::memcpy(whole, p, sizeof(T) * lanes.count);
  return load(whole, Full{});
}
template <class T>
inline void store(T* p, Vec a, Part lanes) {
  T whole[kLanes];
  store(whole, a, Full{});
  std::memcpy(p, whole, sizeof(T) * lanes.count);
}

inline void stream(float* p, Vec a) {
  _mm256_stream_ps(p, a.low);
  _mm256_stream_ps(p + 8, a.high);
}
template <class Half>
inline void stream(Half* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, Half{}));
}
inline void fence() { _mm_sfence(); }

inline __m256 in_order(__m256 a) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8)); }
inline void split_pairs(Vec low, Vec high, Vec& even, Vec& odd) {
  even = {in_order(_mm256_shuffle_ps(low.low, low.high, 0x88)), in_order(_mm256_shuffle_ps(high.low, high.high, 0x88))};
  odd = {in_order(_mm256_shuffle_ps(low.low, low.high, 0xdd)), in_order(_mm256_shuffle_ps(high.low, high.high, 0xdd))};
}
inline void join_eight(__m256 even, __m256 odd, Vec& to) {
  const __m256 first = _mm256_unpacklo_ps(even, odd), second = _mm256_unpackhi_ps(even, odd);
  to = {_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31)};
}
inline void join_pairs(Vec even, Vec odd, Vec& low, Vec& high) {
  join_eight(even.low, odd.low, low);
  join_eight(even.high, odd.high, high);
}

// The same for bf16 in memory, without a shuffle; see simd_avx512.h.
inline __m256i low_halves(__m256i words) { return _mm256_slli_epi32(words, 16); }
inline __m256i high_halves(__m256i words) {
  return _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
}
inline void load_pairs(const BFloat16* p, Vec& even, Vec& odd) {
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  const __m256i first = _mm256_loadu_si256(words), second = _mm256_loadu_si256(words + 1);
  even = {_mm256_castsi256_ps(low_halves(first)), _mm256_castsi256_ps(low_halves(second))};
  odd = {_mm256_castsi256_ps(high_halves(first)), _mm256_castsi256_ps(high_halves(second))};
}
inline __m256i add_half_of_last_place(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}
inline __m256i join_halves(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(add_half_of_last_place(even), 16), add_half_of_last_place(odd), 0xaa);
}
template <bool kStreaming>
inline void put_pairs(BFloat16* p, Vec even, Vec odd) {
  const __m256 nan =
      _mm256_or_ps(_mm256_cmp_ps(even.low, odd.low, _CMP_UNORD_Q), _mm256_cmp_ps(even.high, odd.high, _CMP_UNORD_Q));
  if (__builtin_expect(_mm256_movemask_ps(nan) != 0, 0)) {
    Vec low, high;
    join_pairs(even, odd, low, high);
    store(p, low, Full{});
    store(p + kLanes, high, Full{});
    return;
  }
  __m256i* words = reinterpret_cast<__m256i*>(p);
  const __m256i first = join_halves(even.low, odd.low), second = join_halves(even.high, odd.high);
  if constexpr (kStreaming) {
    _mm256_stream_si256(words, first);
    _mm256_stream_si256(words + 1, second);
  } else {
    _mm256_storeu_si256(words, first);
    _mm256_storeu_si256(words + 1, second);
  }
}

struct SquareSum {
  __m256d part[4];
};
inline SquareSum no_squares() {
  const __m256d zero = _mm256_setzero_pd();
  return {{zero, zero, zero, zero}};
}
inline void add_squares(SquareSum& to, __m128 a, __m128 b, __m128 c, __m128 d) {
  const __m256d wide[4] = {_mm256_cvtps_pd(a), _mm256_cvtps_pd(b), _mm256_cvtps_pd(c), _mm256_cvtps_pd(d)};
  for (int i = 0; i < 4; ++i) to.part[i] = _mm256_fmadd_pd(wide[i], wide[i], to.part[i]);
}
inline void add_squares(SquareSum& to, Vec a) {
  add_squares(to, _mm256_castps256_ps128(a.low), _mm256_extractf128_ps(a.low, 1), _mm256_castps256_ps128(a.high),
              _mm256_extractf128_ps(a.high, 1));
}
// Thirty-two values in two sums, in the orders of simd_avx512.h.
inline void add_squares(SquareSum& one, SquareSum& other, const float* p) {
  add_squares(one, _mm_loadu_ps(p), _mm_loadu_ps(p + 4), _mm_loadu_ps(p + 8), _mm_loadu_ps(p + 12));
  add_squares(other, _mm_loadu_ps(p + 16), _mm_loadu_ps(p + 20), _mm_loadu_ps(p + 24), _mm_loadu_ps(p + 28));
}
inline void add_squares(SquareSum& one, SquareSum& other, const BFloat16* p) {
  for (int i = 0; i < 2; ++i) {
    const __m128i* words = reinterpret_cast<const __m128i*>(p) + 2 * i;
    const __m128i first = _mm_loadu_si128(words), second = _mm_loadu_si128(words + 1);
    const __m128i high = _mm_set1_epi32(static_cast<int>(0xffff0000));
    add_squares(i ? other : one, _mm_castsi128_ps(_mm_slli_epi32(first, 16)),
                _mm_castsi128_ps(_mm_slli_epi32(second, 16)), _mm_castsi128_ps(_mm_and_si128(first, high)),
                _mm_castsi128_ps(_mm_and_si128(second, high)));
  }
}
inline void add_squares(SquareSum& one, SquareSum& other, const Float16* p) {
  add_squares(one, load(p, Full{}));
  add_squares(other, load(p + kLanes, Full{}));
}
inline void lanes_of(const SquareSum& squares, double (&lane)[kLanes]) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(lane + 4 * i, squares.part[i]);
}

}  // namespace k2::cpu::K2_ISA
