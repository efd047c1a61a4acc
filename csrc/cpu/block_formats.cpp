// Snappy's and LZ4's block formats as streams: definitions are in ops.h. Both copy literals and what was written at most
// 64 KiB before (LZ4 by its format, Snappy's own encoder by working in blocks of 64 KiB), so that a buffer of that and
// some more holds what is needed of a block of any size. Other encoders of Snappy may reach further back: that is told.
#include <cstring>

#include "parallel.h"

namespace k2::cpu::K2_ISA {
namespace {

using Byte = unsigned char;

struct Stream {
  const Byte* in;
  const Byte* in_end;
  Byte* begin;  // of what is still there of the output
  Byte* out;
  Byte* out_end;
  int64_t literal, copy, offset;  // bytes still to be written, and how far back the copy lies
  int64_t phase;                  // of LZ4
  bool bad = false;
};

// Both write what they can of what is pending: whether all of it. False where input or output is short, or the copy begins
// before the buffer.
bool write_literal(Stream& s) {
  int64_t count = s.literal;
  if (count > s.in_end - s.in) count = s.in_end - s.in;
  if (count > s.out_end - s.out) count = s.out_end - s.out;
  std::memcpy(s.out, s.in, static_cast<size_t>(count));
  s.in += count;
  s.out += count;
  s.literal -= count;
  return s.literal == 0;
}

bool write_copy(Stream& s) {
  if (s.copy == 0) return true;
  if (s.offset < 1 || s.offset > s.out - s.begin) {
    s.bad = true;
    return false;
  }
  const int64_t count = s.copy < s.out_end - s.out ? s.copy : s.out_end - s.out;
  const Byte* const from = s.out - s.offset;
  if (s.offset >= count) {
    std::memcpy(s.out, from, static_cast<size_t>(count));
  } else {
    for (int64_t i = 0; i < count; ++i) s.out[i] = from[i];
  }
  s.out += count;
  s.copy -= count;
  return s.copy == 0;
}

int64_t little_endian(const Byte* at, int64_t bytes) {
  int64_t value = 0;
  for (int64_t i = 0; i < bytes; ++i) value |= static_cast<int64_t>(at[i]) << (8 * i);
  return value;
}

// google/snappy:format_description.txt, section 2, behind the length.
void unpack_snappy(Stream& s) {
  while (write_literal(s) && write_copy(s)) {
    const int64_t left = s.in_end - s.in;
    if (left < 1) return;
    const Byte tag = *s.in;
    const int64_t upper = tag >> 2;
    constexpr int64_t kOffsetBytes[] = {0, 1, 2, 4};
    const int64_t more = (tag & 3) ? kOffsetBytes[tag & 3] : upper < 60 ? 0 : upper - 59;
    if (left < 1 + more) return;
    const int64_t number = little_endian(s.in + 1, more);
    s.in += 1 + more;
    if ((tag & 3) == 0) {
      s.literal = 1 + (more ? number : upper);
    } else {
      s.copy = (tag & 3) == 1 ? 4 + (upper & 7) : 1 + upper;
      s.offset = (tag & 3) == 1 ? (upper >> 3) << 8 | number : number;
    }
  }
}

// Adds the bytes of a length that go on while they are 255; whether the last is there.
bool pass_length(Stream& s, int64_t& length) {
  while (s.in < s.in_end) {
    const Byte more = *s.in++;
    length += more;
    if (more < 255) return true;
  }
  return false;
}

// lz4/lz4:doc/lz4_Block_format.md. A sequence: a token, literals, and but for the last a copy of 4 bytes or more.
void unpack_lz4(Stream& s) {
  enum Phase { kToken, kLiteralLength, kLiterals, kOffset, kCopyLength, kCopy };
  constexpr int64_t kLeastCopy = 4, kGoesOn = 15;
  for (;;) {
    switch (s.phase) {
      case kToken:
        if (s.in == s.in_end) return;
        s.literal = *s.in >> 4;
        s.copy = kLeastCopy + (*s.in++ & 15);
        s.phase = s.literal == kGoesOn ? kLiteralLength : kLiterals;
        break;
      case kLiteralLength:
        if (!pass_length(s, s.literal)) return;
        s.phase = kLiterals;
        break;
      case kLiterals:
        if (!write_literal(s)) return;
        s.phase = kOffset;
        break;
      case kOffset:
        if (s.in_end - s.in < 2) return;
        s.offset = little_endian(s.in, 2);
        s.in += 2;
        s.phase = s.copy == kLeastCopy + kGoesOn ? kCopyLength : kCopy;
        break;
      case kCopyLength:
        if (!pass_length(s, s.copy)) return;
        s.phase = kCopy;
        break;
      default:
        if (!write_copy(s)) return;
        s.phase = kToken;
    }
  }
}

}  // namespace

void unpack_block(int64_t format, const void* in, int64_t in_size, void* out, int64_t out_size, int64_t* state, int) {
  const Byte* const from = static_cast<const Byte*>(in);
  Byte* const to = static_cast<Byte*>(out);
  Stream s{from, from + in_size, to, to + state[1], to + out_size, state[2], state[3], state[4], state[5]};
  if (format == 0) unpack_snappy(s);
  else unpack_lz4(s);
  const int64_t found[] = {s.in - from, s.out - to, s.literal, s.copy, s.offset, s.phase, s.bad};
  std::memcpy(state, found, sizeof(found));
}

}  // namespace k2::cpu::K2_ISA
