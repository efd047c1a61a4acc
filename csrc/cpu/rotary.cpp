// Rotary embedding: the CPU twin of csrc/rotary.cu. Definitions and shapes are in ops.h.
//
// A token's cosines and sines are laid out once, in the order in which the heads are read, and serve all of them out of
// the first-level cache; q and k are read and written once. bf16 is computed thirty-two values at a time, even and odd
// ones apart, since 16-bit halves of a word are cheaper to part and join than neighbours are to widen and narrow: in
// either pairing the arithmetic would otherwise take longer than the memory.
#include "parallel.h"
#include "prefetch.h"
#include "streaming.h"

namespace k2::cpu::K2_ISA {
namespace {

constexpr int64_t kTablePairs = 256;  // pairs of a head that one pass rotates

template <class T>
constexpr bool kSplitsHalves = std::is_same_v<T, BFloat16>;

// Cosines, sines and their positions of one pass over the heads, [pairs, kTablePairs at most].
struct TableRow {
  alignas(64) float cosine[kTablePairs], sine[kTablePairs];
};

// Copies `pairs` table entries; with kSplit each whole thirty-two as sixteen even ones and sixteen odd ones.
template <bool kSplit>
void lay_out(const float* from, float sign, float* to, int64_t pairs) {
  int64_t i = 0;
  if constexpr (kSplit) {
    for (; i + 2 * kLanes <= pairs; i += 2 * kLanes) {
      Vec even, odd;
      load_pairs(from + i, even, odd);
      store(to + i, even * splat(sign), Full{});
      store(to + i + kLanes, odd * splat(sign), Full{});
    }
  }
  for_lanes(pairs - i, [&](int64_t rest, auto lanes) {
    store(to + i + rest, load(from + i + rest, lanes) * splat(sign), lanes);
  });
}

inline void turn(Vec& first, Vec& second, const float* cosines, const float* sines) {
  const Vec cosine = load(cosines, Full{}), sine = load(sines, Full{});
  const Vec turned = fms(first, cosine, second * sine);
  second = fma(second, cosine, first * sine);
  first = turned;
}

// Pairs (x[i], x[i + half]) for i from 0 to pairs - 1; x and to may be the same. `ahead` elements on lies the next row.
template <bool kStreaming, class T>
inline void rotate_halves(const T* x, T* to, int64_t half, const TableRow& row, int64_t pairs, int64_t ahead) {
  int64_t i = 0;
  if constexpr (kSplitsHalves<T>) {
    for (; i + 2 * kLanes <= pairs; i += 2 * kLanes) {
      prefetch_row(x + i, ahead, Twice{});
      prefetch_row(x + half + i, ahead, Twice{});
      Vec first_even, first_odd, second_even, second_odd;
      load_pairs(x + i, first_even, first_odd);
      load_pairs(x + half + i, second_even, second_odd);
      turn(first_even, second_even, row.cosine + i, row.sine + i);
      turn(first_odd, second_odd, row.cosine + i + kLanes, row.sine + i + kLanes);
      put_pairs<kStreaming>(to + i, first_even, first_odd);
      put_pairs<kStreaming>(to + half + i, second_even, second_odd);
    }
  }
  for_lanes(pairs - i, [&](int64_t rest, auto lanes) {
    const int64_t at = i + rest;
    prefetch_row(x + at, ahead, lanes);
    prefetch_row(x + half + at, ahead, lanes);
    Vec first = load(x + at, lanes), second = load(x + half + at, lanes);
    turn(first, second, row.cosine + at, row.sine + at);
    put<kStreaming>(to + at, first, lanes);
    put<kStreaming>(to + half + at, second, lanes);
  });
}

// Pairs (x[2i], x[2i + 1]) for i from 0 to pairs - 1; x and to may be the same. `ahead` elements on lies the next row.
template <bool kStreaming, class T>
inline void rotate_pairs(const T* x, T* to, const TableRow& row, int64_t pairs, int64_t ahead) {
  const auto rotate_sixteen = [&](const T* from, T* into, int64_t i, auto streaming) {
    Vec first, second;
    load_pairs(from, first, second);
    turn(first, second, row.cosine + i, row.sine + i);
    put_pairs<streaming.value>(into, first, second);
  };
  for_lanes(pairs, [&](int64_t i, auto lanes) {
    if constexpr (decltype(lanes)::kWhole) {
      prefetch_row(x + 2 * i, ahead, Twice{});
      rotate_sixteen(x + 2 * i, to + 2 * i, i, Truth<kStreaming>{});
    } else {
      T rest[2 * kLanes] = {};
      std::memcpy(rest, x + 2 * i, 2 * lanes.count * sizeof(T));
      rotate_sixteen(rest, rest, i, Truth<false>{});
      std::memcpy(to + 2 * i, rest, 2 * lanes.count * sizeof(T));
    }
  });
}

struct Strides {
  int64_t s, b, n;

  int64_t at(int64_t s_index, int64_t b_index, int64_t n_index) const { return s_index * s + b_index * b + n_index * n; }
};

template <class T>
struct Heads {
  const T* from;
  Strides from_strides;
  T* to;
  Strides to_strides;
  int64_t count;
};

struct Table {
  const float *cosines, *sines;
  const int32_t* positions;  // [S, B] or null
  int64_t rows;
};

struct Shape {
  int64_t sequence, batch, head_dim, rotary_dim;
};

// Whether an output is written line by line, and is too large for the caches (streaming.h).
template <class T>
bool is_streamed(const Heads<T>& heads, const Shape& shape, bool interleaved) {
  const auto whole_lines = [](int64_t elements) { return elements * sizeof(T) % 64 == 0; };
  const Strides& to = heads.to_strides;
  const int64_t elements = shape.sequence * shape.batch * heads.count * shape.rotary_dim;
  return heads.from != heads.to && elements * static_cast<int64_t>(sizeof(T)) >= kBytesWorthStreaming &&
         reinterpret_cast<uintptr_t>(heads.to) % 64 == 0 && whole_lines(to.s) && whole_lines(to.b) &&
         whole_lines(to.n) && whole_lines(interleaved ? shape.rotary_dim : shape.rotary_dim / 2);
}

// Calls visit(is_key, n) for every head of a token: k's after the heads of q that attend to it, the order of
// megatron-core's QKV rows in memory. There is one call, so that what it does is compiled into the loop.
template <class Visit>
inline void for_heads(int64_t q_heads, int64_t k_heads, Visit&& visit) {
  int64_t q = 0, k = 0, next_key = k_heads > 0 ? q_heads / k_heads : q_heads + 1;  // the head of q that k waits for
  for (int64_t head = 0; head < q_heads + k_heads; ++head) {
    const bool is_key = q >= next_key;
    visit(is_key, is_key ? k : q);
    if (is_key) next_key = ++k < k_heads ? q_heads * (k + 1) / k_heads : q_heads + 1;
    else ++q;
  }
}

// One token: its heads of q and k.
template <bool kInterleaved, bool kStreaming, class T>
void rotate_token(const Heads<T>& q, const Heads<T>& k, const Table& table, const Shape& shape, int64_t s, int64_t b,
                  float sign) {
  constexpr bool kSplit = !kInterleaved && kSplitsHalves<T>;
  const int64_t position = table.positions ? table.positions[s * shape.batch + b] : s;
  const bool is_known = position >= 0 && position < table.rows;
  const int64_t half = shape.rotary_dim / 2, tail = shape.head_dim - shape.rotary_dim;
  const bool starts_row = b + 1 == shape.batch;  // of the next token
  TableRow row;
  for (int64_t begin = 0; begin < half; begin += kTablePairs) {
    const int64_t pairs = half - begin < kTablePairs ? half - begin : kTablePairs;
    if (is_known) {
      lay_out<kSplit>(table.cosines + position * half + begin, 1.0f, row.cosine, pairs);
      lay_out<kSplit>(table.sines + position * half + begin, sign, row.sine, pairs);
    } else {  // a position outside of the table shows in the loss
      for (int64_t i = 0; i < pairs; ++i) row.cosine[i] = row.sine[i] = __builtin_nanf("");
    }
    for_heads(q.count, k.count, [&](bool is_key, int64_t n) {
      const Heads<T>& heads = is_key ? k : q;
      const Strides& strides = heads.from_strides;
      const T* from = heads.from + strides.at(s, b, n);
      T* to = heads.to + heads.to_strides.at(s, b, n);
      const int64_t ahead = starts_row ? strides.s - b * strides.b : strides.b;
      if constexpr (kInterleaved) rotate_pairs<kStreaming>(from + 2 * begin, to + 2 * begin, row, pairs, ahead);
      else rotate_halves<kStreaming>(from + begin, to + begin, half, row, pairs, ahead);
      if (begin == 0 && tail > 0 && from != to)
        std::memcpy(to + shape.rotary_dim, from + shape.rotary_dim, tail * sizeof(T));
    });
  }
}

}  // namespace

void rotary(const void* q, int64_t q_stride_s, int64_t q_stride_b, int64_t q_stride_n, void* to_q,
            int64_t to_q_stride_s, int64_t to_q_stride_b, int64_t to_q_stride_n, const void* k, int64_t k_stride_s,
            int64_t k_stride_b, int64_t k_stride_n, void* to_k, int64_t to_k_stride_s, int64_t to_k_stride_b,
            int64_t to_k_stride_n, const float* cosines, const float* sines, const int32_t* positions,
            int64_t table_rows, int64_t sequence, int64_t batch, int64_t q_heads, int64_t k_heads, int64_t head_dim,
            int64_t rotary_dim, bool interleaved, bool conjugate, DType dtype, int threads) {
  const Table table{cosines, sines, positions, table_rows};
  const Shape shape{sequence, batch, head_dim, rotary_dim};
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Heads<T> q_heads_of{static_cast<const T*>(q), {q_stride_s, q_stride_b, q_stride_n}, static_cast<T*>(to_q),
                              {to_q_stride_s, to_q_stride_b, to_q_stride_n}, q_heads};
    const Heads<T> k_heads_of{static_cast<const T*>(k), {k_stride_s, k_stride_b, k_stride_n}, static_cast<T*>(to_k),
                              {to_k_stride_s, to_k_stride_b, to_k_stride_n}, k ? k_heads : 0};
    const bool streamed = is_streamed(q_heads_of, shape, interleaved) &&
                          (k_heads_of.count == 0 || is_streamed(k_heads_of, shape, interleaved));
    const int64_t bytes = sequence * batch * (q_heads + k_heads_of.count) * head_dim * 2 * int64_t{sizeof(T)};
    with_truth(interleaved, [&](auto pairs) {
      with_truth(streamed, [&](auto streaming) {
        parallel_ranges(sequence * batch, bytes, threads, [&](int64_t first, int64_t last) {
          for (int64_t token = first; token < last; ++token)
            rotate_token<pairs.value, streaming.value>(q_heads_of, k_heads_of, table, shape, token / batch,
                                                       token % batch, conjugate ? -1.0f : 1.0f);
        });
      });
    });
  });
}

}  // namespace k2::cpu::K2_ISA
