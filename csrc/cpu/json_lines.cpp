// Texts out of JSON lines, and ids into token files: what preprocessing does to every byte besides encoding it.
// Definitions are in ops.h. json_texts takes a line only where it is sure of it: strict JSON (RFC 8259), the string
// under the key (the last one, if it is there twice), escapes and UTF-8 sound. Whatever else is left to the caller's own
// parser, so that no line is ever judged bad here.
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "parallel.h"

namespace k2::cpu::K2_ISA {
namespace {

using Byte = unsigned char;
constexpr int kDeepest = 32;   // nesting; deeper lines are left to the caller
constexpr int kDigits = 200;   // of a number, and two of its exponent: a double for certain
constexpr int64_t kWide = 32;  // bytes of a step; `text` has room for one step more than the block

struct Line {
  const Byte* at;
  const Byte* end;  // of the block
  bool ascii = true;
};

inline bool ends_run(Byte c) { return c == '"' || c == '\\' || c < 0x20; }

// Moves line.at over the run of plain characters there, to the next quote, backslash or control character; copies the
// run to out where Copy, and returns the end of the copy. False in `found` where the block ends first.
template <bool Copy>
inline Byte* pass_run(Line& line, Byte* out, bool& found) {
#ifdef __AVX2__
  const __m256i quote = _mm256_set1_epi8('"'), backslash = _mm256_set1_epi8('\\'), control = _mm256_set1_epi8(0x1F);
  while (line.end - line.at >= kWide) {
    const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line.at));
    if (Copy) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), block);
    const __m256i special = _mm256_or_si256(_mm256_or_si256(_mm256_cmpeq_epi8(block, quote),
                                                            _mm256_cmpeq_epi8(block, backslash)),
                                            _mm256_cmpeq_epi8(_mm256_min_epu8(block, control), block));
    const unsigned stops = static_cast<unsigned>(_mm256_movemask_epi8(special));
    const unsigned high = static_cast<unsigned>(_mm256_movemask_epi8(block));
    const int length = stops ? __builtin_ctz(stops) : static_cast<int>(kWide);
    if (high) line.ascii = false;  // perhaps of what follows the run: then UTF-8 is checked in vain
    line.at += length;
    out += Copy ? length : 0;
    if (stops) {
      found = true;
      return out;
    }
  }
#endif
  for (; line.at < line.end; ++line.at) {
    if (ends_run(*line.at)) {
      found = true;
      return out;
    }
    if (*line.at >= 0x80) line.ascii = false;
    if (Copy) *out++ = *line.at;
  }
  found = false;
  return out;
}

// The value of four hexadecimal digits, -1 where they are none.
inline int32_t hexadecimal(const Line& line) {
  if (line.end - line.at < 4) return -1;
  int32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    const Byte c = line.at[i];
    const int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
    if (digit < 0) return -1;
    value = value << 4 | digit;
  }
  return value;
}

inline Byte* write_utf8(uint32_t point, Byte* out) {
  if (point < 0x80) {
    *out++ = static_cast<Byte>(point);
    return out;
  }
  const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  constexpr Byte kLead[] = {0, 0xC0, 0xE0, 0xF0};
  *out++ = static_cast<Byte>(kLead[more] | point >> (6 * more));
  for (int rest = more - 1; rest >= 0; --rest) *out++ = static_cast<Byte>(0x80 | (point >> (6 * rest) & 0x3F));
  return out;
}

// line.at is behind a backslash. Writes the character and moves behind the escape; null where it is not sound.
inline Byte* pass_escape(Line& line, Byte* out) {
  if (line.at >= line.end) return nullptr;
  const Byte c = *line.at++;
  switch (c) {
    case '"': case '\\': case '/': *out = c; return out + 1;
    case 'n': *out = '\n'; return out + 1;
    case 't': *out = '\t'; return out + 1;
    case 'r': *out = '\r'; return out + 1;
    case 'b': *out = '\b'; return out + 1;
    case 'f': *out = '\f'; return out + 1;
    case 'u': break;
    default: return nullptr;
  }
  int32_t point = hexadecimal(line);
  if (point < 0 || (point >= 0xDC00 && point < 0xE000)) return nullptr;
  line.at += 4;
  if (point >= 0xD800 && point < 0xDC00) {
    if (line.end - line.at < 6 || line.at[0] != '\\' || line.at[1] != 'u') return nullptr;
    line.at += 2;
    const int32_t low = hexadecimal(line);
    if (low < 0xDC00 || low >= 0xE000) return nullptr;
    line.at += 4;
    point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
  }
  return write_utf8(static_cast<uint32_t>(point), out);
}

// line.at is behind the opening quote; moves behind the closing one, and out behind the copy. False where not sound.
template <bool Copy>
bool pass_string(Line& line, Byte*& out) {
  Byte unused[4];
  for (;;) {
    bool found;
    out = pass_run<Copy>(line, out, found);
    if (!found || *line.at < 0x20) return false;
    if (*line.at++ == '"') return true;
    Byte* const after = pass_escape(line, Copy ? out : unused);
    if (after == nullptr) return false;
    if (Copy) out = after;
  }
}

inline bool skip_string(Line& line) {
  Byte* nowhere = nullptr;
  return pass_string<false>(line, nowhere);
}

inline void pass_space(Line& line) {
  while (line.at < line.end && (*line.at == ' ' || *line.at == '\t' || *line.at == '\r')) ++line.at;
}

inline bool pass(Line& line, Byte wanted) {
  pass_space(line);
  if (line.at >= line.end || *line.at != wanted) return false;
  ++line.at;
  pass_space(line);
  return true;
}

inline bool pass_digits(Line& line, int& left) {
  const Byte* const first = line.at;
  for (; line.at < line.end && *line.at >= '0' && *line.at <= '9'; ++line.at) --left;
  return line.at > first;
}

// Numbers that may be beyond a double are left to the caller.
inline bool pass_number(Line& line) {
  int left = kDigits;
  if (*line.at == '-') ++line.at;
  const Byte* const first = line.at;
  if (!pass_digits(line, left)) return false;
  if (*first == '0' && line.at - first > 1) return false;
  if (line.at < line.end && *line.at == '.') {
    ++line.at;
    if (!pass_digits(line, left)) return false;
  }
  if (line.at < line.end && (*line.at | 32) == 'e') {
    ++line.at;
    if (line.at < line.end && (*line.at == '+' || *line.at == '-')) ++line.at;
    int exponent = 2;
    if (!pass_digits(line, exponent) || exponent < 0) return false;
  }
  return left >= 0;
}

inline bool pass_word(Line& line, const char* word) {
  const int64_t size = static_cast<int64_t>(std::strlen(word));
  if (line.end - line.at < size || std::memcmp(line.at, word, static_cast<size_t>(size)) != 0) return false;
  line.at += size;
  return true;
}

// Space is not passed behind the opening quote: there it belongs to the key.
inline bool pass_key(Line& line) {
  pass_space(line);
  return line.at < line.end && *line.at++ == '"' && skip_string(line);
}

bool pass_value(Line& line, int depth) {
  if (line.at >= line.end || depth > kDeepest) return false;
  switch (*line.at) {
    case '"': ++line.at; return skip_string(line);
    case 't': return pass_word(line, "true");
    case 'f': return pass_word(line, "false");
    case 'n': return pass_word(line, "null");
    case '{': case '[': break;
    default: return pass_number(line);
  }
  const bool object = *line.at++ == '{';
  const Byte close = object ? '}' : ']';
  if (pass(line, close)) return true;
  do {
    if (object && !(pass_key(line) && pass(line, ':'))) return false;
    if (!pass_value(line, depth + 1)) return false;
  } while (pass(line, ','));
  return pass(line, close);
}

bool is_utf8(const Byte* at, const Byte* end) {
  while (at < end) {
    const Byte lead = *at++;
    if (lead < 0x80) continue;
    if (lead < 0xC2 || lead > 0xF4) return false;
    const int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    if (end - at < more) return false;
    // no overlong form, no surrogate, nothing past U+10FFFF
    const Byte low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const Byte high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (at[0] < low || at[0] > high) return false;
    for (int i = 1; i < more; ++i)
      if ((at[i] & 0xC0) != 0x80) return false;
    at += more;
  }
  return true;
}

// The text of the line at line.at, moved behind the line's end; the end of the text, null where the line is not taken.
Byte* pass_line(Line& line, const Byte* key, int64_t key_size, Byte* text) {
  const Byte* const start = line.at;
  Byte* after = nullptr;
  if (!pass(line, '{')) return nullptr;
  do {
    if (line.at >= line.end || *line.at++ != '"') return nullptr;
    const Byte* const name = line.at;
    if (!skip_string(line)) return nullptr;
    const int64_t name_size = line.at - 1 - name;
    if (std::memchr(name, '\\', static_cast<size_t>(name_size)) != nullptr || !pass(line, ':')) return nullptr;
    if (name_size != key_size || std::memcmp(name, key, static_cast<size_t>(key_size)) != 0) {
      if (!pass_value(line, 1)) return nullptr;
      continue;
    }
    if (line.at >= line.end || *line.at++ != '"') return nullptr;
    after = text;
    if (!pass_string<true>(line, after)) return nullptr;
  } while (pass(line, ','));
  if (after == nullptr || !pass(line, '}')) return nullptr;
  if (!line.ascii && !is_utf8(start, line.at)) return nullptr;
  if (line.at < line.end && *line.at++ != '\n') return nullptr;
  return after;
}

}  // namespace

void json_texts(const void* block, int64_t size, const void* key, int64_t key_size, void* text, int64_t* offsets,
                int64_t* cursor, int) {
  const Byte* const begin = static_cast<const Byte*>(block);
  Line line{begin + cursor[0], begin + size};
  while (line.at < line.end) {
    Byte* const out = static_cast<Byte*>(text) + offsets[cursor[1]];
    line.ascii = true;
    const Byte* const after = pass_line(line, static_cast<const Byte*>(key), key_size, out);
    if (after == nullptr) return;
    offsets[cursor[1] + 1] = after - static_cast<Byte*>(text);
    cursor[0] = line.at - begin;
    ++cursor[1];
  }
}

void narrow_ids(const uint32_t* ids, const int64_t* lengths, int64_t documents, int64_t end, void* out,
                int64_t itemsize, int) {
  const auto narrow = [&](auto integer) {
    using Integer = decltype(integer);
    Integer* to = static_cast<Integer*>(out);
    for (int64_t document = 0; document < documents; ++document) {
      const int64_t length = lengths[document];
      for (int64_t i = 0; i < length; ++i) to[i] = static_cast<Integer>(ids[i]);
      ids += length;
      to += length;
      if (length > 0 && end >= 0) *to++ = static_cast<Integer>(end);
    }
  };
  if (itemsize == 2) narrow(uint16_t{});
  else narrow(int32_t{});
}

}  // namespace k2::cpu::K2_ISA
