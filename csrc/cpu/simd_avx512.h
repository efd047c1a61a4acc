// Sixteen lanes as one AVX-512 register (F, BW, DQ, VL). See simd.h.
#pragma once

#include <immintrin.h>

namespace k2::cpu::K2_ISA {

constexpr bool kFusedMultiplyAdd = true;

struct Vec {
  __m512 v;
};

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator-(Vec a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }

inline __mmask16 mask(Full) { return 0xffff; }
inline __mmask16 mask(Part lanes) { return static_cast<__mmask16>((1u << lanes.count) - 1); }

// The lanes in play from a, the others from b.
template <class Lanes>
inline Vec choose(Lanes lanes, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(mask(lanes), b.v, a.v)};
}

// p * 2^n, rounded once; n is a whole number. (`shifted` serves instruction sets without scalef.)
inline Vec scale_by_power_of_two(Vec p, Vec n, Vec /*shifted*/) { return {_mm512_scalef_ps(p.v, n.v)}; }

// ((i + i+8) + (i+4 + i+12)) and so on: halves are folded until one lane is left.
inline float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float max(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline __m512 widen(__m256i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widen(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }

// To bf16, nearest even: half of the last kept place, less one where that place is even, is added before truncation.
// NaN is truncated and made quiet, or the addition could carry it into infinity. (vcvtneps2bf16 would flush
// subnormals.)
inline __m256i narrow(Vec a, BFloat16) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i kept = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(kept, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, kept, _mm512_set1_epi32(0x40)));
}
inline __m256i narrow(Vec a, Float16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, Part lanes) { return {_mm512_maskz_loadu_ps(mask(lanes), p)}; }
inline void store(float* p, Vec a, Full) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, Part lanes) { _mm512_mask_storeu_ps(p, mask(lanes), a.v); }

template <class Half>
inline Vec load(const Half* p, Full) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{})};
}
template <class Half>
inline Vec load(const Half* p, Part lanes) {
  return {widen(_mm256_maskz_loadu_epi16(mask(lanes), p), Half{})};
}
template <class Half>
inline void store(Half* p, Vec a, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, Half{}));
}
template <class Half>
inline void store(Half* p, Vec a, Part lanes) {
  _mm256_mask_storeu_epi16(p, mask(lanes), narrow(a, Half{}));
}

// Non-temporal stores, for addresses that are multiples of 16 elements; fence() before another thread reads.
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
template <class Half>
inline void stream(Half* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a, Half{}));
}
inline void fence() { _mm_sfence(); }

// Thirty-two values in a row, (even, odd) pairs, to the even ones and the odd ones, and back.
inline void split_pairs(Vec low, Vec high, Vec& even, Vec& odd) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even.v = _mm512_permutex2var_ps(low.v, evens, high.v);
  odd.v = _mm512_permutex2var_ps(low.v, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), high.v);
}
inline void join_pairs(Vec even, Vec odd, Vec& low, Vec& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low.v = _mm512_permutex2var_ps(even.v, first, odd.v);
  high.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v);
}

// The same for bf16 in memory, which needs no shuffle: an even value is the low half of a 32-bit word, an odd one the
// high half. The rounding is narrow's; a NaN, which it would carry away, takes the slower path.
inline void load_pairs(const BFloat16* p, Vec& even, Vec& odd) {
  const __m512i words = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline __m512i add_half_of_last_place(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v), half = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}
template <bool kStreaming>
inline void put_pairs(BFloat16* p, Vec even, Vec odd) {
  if (__builtin_expect(_mm512_cmp_ps_mask(even.v, odd.v, _CMP_UNORD_Q) != 0, 0)) {
    Vec low, high;
    join_pairs(even, odd, low, high);
    store(p, low, Full{});
    store(p + kLanes, high, Full{});
    return;
  }
  const __m512i low = _mm512_srli_epi32(add_half_of_last_place(even), 16), high = add_half_of_last_place(odd);
  const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
  if constexpr (kStreaming) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), words);
  else _mm512_storeu_si512(p, words);
}

// Sixteen fp64 lanes that gather squares. A product of two floats is exact in fp64.
struct SquareSum {
  __m512d low, high;
};
inline SquareSum no_squares() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline void add_squares(SquareSum& to, __m256 first, __m256 second) {
  const __m512d low = _mm512_cvtps_pd(first), high = _mm512_cvtps_pd(second);
  to.low = _mm512_fmadd_pd(low, low, to.low);
  to.high = _mm512_fmadd_pd(high, high, to.high);
}
inline void add_squares(SquareSum& to, Vec a) {
  add_squares(to, _mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
// Thirty-two values in two sums, in an order of the type's own that takes no shuffle.
inline void add_squares(SquareSum& one, SquareSum& other, const float* p) {
  add_squares(one, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
  add_squares(other, _mm256_loadu_ps(p + 16), _mm256_loadu_ps(p + 24));
}
inline void add_squares(SquareSum& one, SquareSum& other, const BFloat16* p) {
  for (int i = 0; i < 2; ++i) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    const __m256i odd = _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    add_squares(i ? other : one, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), _mm256_castsi256_ps(odd));
  }
}
inline void add_squares(SquareSum& one, SquareSum& other, const Float16* p) {
  add_squares(one, load(p, Full{}));
  add_squares(other, load(p + kLanes, Full{}));
}
inline void lanes_of(const SquareSum& squares, double (&lane)[kLanes]) {
  _mm512_storeu_pd(lane, squares.low);
  _mm512_storeu_pd(lane + 8, squares.high);
}

}  // namespace k2::cpu::K2_ISA
