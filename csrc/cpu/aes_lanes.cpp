// The hash of checkpoint files, by rounds of AES: definition is in ops.h. All forms below give the same lanes.
//
// Integers only, so no Vec: a Word is one lane, and `round` what a lane does with a word of data. Processors have an
// instruction for it (x86-64 with AVX2; Arm with the AES extension); without one it is four tables. AVX-512 has one for
// four lanes at once (VAES), but not in every processor: it is asked for at run time.
//
// Speed of one core of a Sapphire Rapids, 256 KiB in the second-level cache: dev/LOG.md, "hashing".
#include <cstring>

#if defined(__AES__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_AES)
#include <arm_neon.h>
#endif

#include "parallel.h"

namespace k2::cpu::K2_ISA {
namespace {

constexpr int kLaneCount = 32, kWordBytes = 16, kStripeBytes = kLaneCount * kWordBytes;
constexpr int kFoldRounds = 4;

#if defined(__AES__)

using Word = __m128i;
inline Word load_word(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
inline void store_word(void* at, Word word) { _mm_storeu_si128(static_cast<__m128i*>(at), word); }
inline Word exclusive_or(Word a, Word b) { return _mm_xor_si128(a, b); }
inline Word round(Word state, Word data) { return _mm_aesenc_si128(state, data); }

#elif defined(__ARM_FEATURE_AES)

using Word = uint8x16_t;
inline Word load_word(const void* at) { return vld1q_u8(static_cast<const uint8_t*>(at)); }
inline void store_word(void* at, Word word) { vst1q_u8(static_cast<uint8_t*>(at), word); }
inline Word exclusive_or(Word a, Word b) { return veorq_u8(a, b); }
inline Word round(Word state, Word data) {
  return veorq_u8(vaesmcq_u8(vaeseq_u8(state, vdupq_n_u8(0))), data);  // Arm adds its key before SubBytes
}

#else

struct Word {
  uint32_t column[4];
};

// MixColumns of SubBytes of a byte in each row of a column (FIPS 197, sections 5.1.1 and 5.1.3).
struct Tables {
  uint32_t of[4][256];
};

constexpr uint8_t doubled(uint8_t x) { return static_cast<uint8_t>(x << 1 ^ (x & 0x80 ? 0x1B : 0)); }

constexpr Tables make_tables() {
  uint8_t substitute[256] = {0x63};
  uint8_t p = 1, q = 1;  // q is the inverse of p, which runs through the powers of 3
  do {
    p = static_cast<uint8_t>(p ^ doubled(p));
    q = static_cast<uint8_t>(q ^ q << 1);
    q = static_cast<uint8_t>(q ^ q << 2);
    q = static_cast<uint8_t>(q ^ q << 4);
    if (q & 0x80) q ^= 0x09;
    const unsigned twice = q * 0x101u;  // rotations of q are shifts of this
    substitute[p] = static_cast<uint8_t>(0x63 ^ twice ^ twice >> 7 ^ twice >> 6 ^ twice >> 5 ^ twice >> 4);
  } while (p != 1);
  Tables tables{};
  for (int byte = 0; byte < 256; ++byte) {
    const uint32_t once = substitute[byte], twofold = doubled(substitute[byte]);
    uint32_t column = twofold | once << 8 | once << 16 | (twofold ^ once) << 24;
    for (auto& table : tables.of) {
      table[byte] = column;
      column = column << 8 | column >> 24;
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

inline Word load_word(const void* at) {
  Word word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}
inline void store_word(void* at, Word word) { std::memcpy(at, &word, sizeof(word)); }
inline Word exclusive_or(Word a, Word b) {
  for (int i = 0; i < 4; ++i) a.column[i] ^= b.column[i];
  return a;
}
inline Word round(Word state, Word data) {
  const uint32_t* const s = state.column;
  for (int i = 0; i < 4; ++i)  // ShiftRows: row r comes from r columns further on
    data.column[i] ^= kTables.of[0][s[i] & 0xFF] ^ kTables.of[1][s[(i + 1) % 4] >> 8 & 0xFF] ^
                      kTables.of[2][s[(i + 2) % 4] >> 16 & 0xFF] ^ kTables.of[3][s[(i + 3) % 4] >> 24];
  return data;
}

#endif

// Eight lanes at once are what registers hold and what covers the latency of an instruction; a piece of stripes stays in
// the first-level cache while the lanes take their turns.
constexpr int kLanesAtOnce = 8;
constexpr int64_t kStripesAtOnce = 16;

void absorb_by_words(unsigned char* lanes, const unsigned char* data, int64_t stripes) {
  for (int64_t first = 0; first < stripes; first += kStripesAtOnce) {
    const int64_t count = stripes - first < kStripesAtOnce ? stripes - first : kStripesAtOnce;
    for (int lane = 0; lane < kLaneCount; lane += kLanesAtOnce) {
      const unsigned char* at = data + first * kStripeBytes + lane * kWordBytes;
      unsigned char* const own = lanes + lane * kWordBytes;
      Word state[kLanesAtOnce];
      for (int i = 0; i < kLanesAtOnce; ++i) state[i] = load_word(own + i * kWordBytes);
      for (int64_t stripe = 0; stripe < count; ++stripe, at += kStripeBytes)
        for (int i = 0; i < kLanesAtOnce; ++i) state[i] = round(state[i], load_word(at + i * kWordBytes));
      for (int i = 0; i < kLanesAtOnce; ++i) store_word(own + i * kWordBytes, state[i]);
    }
  }
}

#if defined(__AVX512F__)
__attribute__((target("vaes"))) void absorb_by_four_words(unsigned char* lanes, const unsigned char* data,
                                                          int64_t stripes) {
  constexpr int kRegisters = kStripeBytes / 64;
  __m512i state[kRegisters];
  for (int i = 0; i < kRegisters; ++i) state[i] = _mm512_loadu_si512(lanes + i * 64);
  const auto take = [&](int at) { return _mm512_loadu_si512(data + at * 64); };
  for (; stripes >= 2; stripes -= 2, data += 2 * kStripeBytes)  // two: a tenth faster than one
    for (int i = 0; i < 2 * kRegisters; ++i)
      state[i % kRegisters] = _mm512_aesenc_epi128(state[i % kRegisters], take(i));
  if (stripes)
    for (int i = 0; i < kRegisters; ++i) state[i] = _mm512_aesenc_epi128(state[i], take(i));
  for (int i = 0; i < kRegisters; ++i) _mm512_storeu_si512(lanes + i * 64, state[i]);
}
#endif

}  // namespace

void aes_lanes_absorb(void* lanes, const void* data, int64_t stripes, int) {
  unsigned char* const own = static_cast<unsigned char*>(lanes);
  const unsigned char* const from = static_cast<const unsigned char*>(data);
#if defined(__AVX512F__)
  static const bool vaes = __builtin_cpu_supports("vaes");
  if (vaes) return absorb_by_four_words(own, from, stripes);
#endif
  absorb_by_words(own, from, stripes);
}

void aes_lanes_digest(const void* lanes, int64_t bytes, void* digest, int) {
  const unsigned char* const own = static_cast<const unsigned char*>(lanes);
  unsigned char length[kWordBytes] = {}, zeros[kWordBytes] = {};
  std::memcpy(length, &bytes, sizeof(bytes));
  Word fold = load_word(length);
  for (int lane = 0; lane < kLaneCount; ++lane) {
    fold = exclusive_or(fold, load_word(own + lane * kWordBytes));
    for (int i = 0; i < kFoldRounds; ++i) fold = round(fold, load_word(zeros));
  }
  store_word(digest, fold);
}

}  // namespace k2::cpu::K2_ISA
