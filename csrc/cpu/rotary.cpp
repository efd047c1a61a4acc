// Rotary embedding in place: the CPU twin of csrc/rotary.cu. Definitions and shapes are in ops.h.
//
// A token's cosines and sines are read once from memory and serve all heads out of the first-level cache; q and k are
// read and written once.
#include "parallel.h"
#include "prefetch.h"

namespace k2::cpu::K2_ISA {
namespace {

// One head of one token: element i pairs with i + half.
template <class T>
void rotate_halves(T* x, const float* cosines, const float* sines, float sign, int64_t half) {
  for_lanes(half, [&](int64_t i, auto lanes) {
    const Vec cosine = load(cosines + i, lanes), sine = load(sines + i, lanes) * splat(sign);
    const Vec first = load(x + i, lanes), second = load(x + half + i, lanes);
    store(x + i, fma(first, cosine, -(second * sine)), lanes);
    store(x + half + i, fma(second, cosine, first * sine), lanes);
  });
}

// Sixteen pairs (x[2i], x[2i + 1]).
template <class T>
void rotate_sixteen_pairs(T* x, Vec cosine, Vec sine) {
  Vec first, second, low, high;
  split_pairs(load(x, Full{}), load(x + kLanes, Full{}), first, second);
  join_pairs(fma(first, cosine, -(second * sine)), fma(second, cosine, first * sine), low, high);
  store(x, low, Full{});
  store(x + kLanes, high, Full{});
}

template <class T>
void rotate_pairs(T* x, const float* cosines, const float* sines, float sign, int64_t half) {
  for_lanes(half, [&](int64_t i, auto lanes) {
    const Vec cosine = load(cosines + i, lanes), sine = load(sines + i, lanes) * splat(sign);
    if constexpr (decltype(lanes)::kWhole) {
      rotate_sixteen_pairs(x + 2 * i, cosine, sine);
    } else {
      T pairs[2 * kLanes] = {};
      std::memcpy(pairs, x + 2 * i, 2 * lanes.count * sizeof(T));
      rotate_sixteen_pairs(pairs, cosine, sine);
      std::memcpy(x + 2 * i, pairs, 2 * lanes.count * sizeof(T));
    }
  });
}

// What a position outside the table leaves: NaN, so that the loss shows it.
template <class T>
void poison(T* x, int64_t length) {
  for_lanes(length, [&](int64_t i, auto lanes) { store(x + i, splat(__builtin_nanf("")), lanes); });
}

template <class T>
struct Heads {
  T* data;
  int64_t stride_s, stride_b, stride_n, count;

  T* at(int64_t s, int64_t b, int64_t n) const { return data + s * stride_s + b * stride_b + n * stride_n; }
};

struct Table {
  const float *cosines, *sines;
  const int32_t* positions;  // [S, B] or null
  int64_t rows;
};

template <bool kInterleaved, class T>
void rotate_all(const Heads<T>& q, const Heads<T>& k, const Table& table, int64_t sequence, int64_t batch,
                int64_t rotary_dim, float sign, int threads) {
  const int64_t half = rotary_dim / 2;
  const int64_t bytes = sequence * batch * (q.count + k.count) * rotary_dim * 2 * static_cast<int64_t>(sizeof(T));
  parallel_ranges(sequence * batch, bytes, threads, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t s = token / batch, b = token % batch;
      const int64_t row = table.positions ? table.positions[token] : s;
      const int64_t ahead = b + 1 < batch ? q.stride_b : q.stride_s - (batch - 1) * q.stride_b;
      const float *cosines = table.cosines + row * half, *sines = table.sines + row * half;
      auto rotate = [&](T* head) {
        prefetch(head, ahead, rotary_dim);
        if (row < 0 || row >= table.rows) poison(head, rotary_dim);
        else if constexpr (kInterleaved) rotate_pairs(head, cosines, sines, sign, half);
        else rotate_halves(head, cosines, sines, sign, half);
      };
      // Each k head after the q heads that attend to it: the order of megatron-core's QKV rows in memory.
      int64_t n = 0;
      for (int64_t group = 0; group < k.count; ++group) {
        for (; n < q.count * (group + 1) / k.count; ++n) rotate(q.at(s, b, n));
        rotate(k.at(s, b, group));
      }
      for (; n < q.count; ++n) rotate(q.at(s, b, n));
    }
  });
}

}  // namespace

void rotary(void* q, int64_t q_stride_s, int64_t q_stride_b, int64_t q_stride_n, void* k, int64_t k_stride_s,
            int64_t k_stride_b, int64_t k_stride_n, const float* cosines, const float* sines, const int32_t* positions,
            int64_t table_rows, int64_t sequence, int64_t batch, int64_t q_heads, int64_t k_heads, int64_t rotary_dim,
            bool interleaved, bool conjugate, DType dtype, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Heads<T> q_view{static_cast<T*>(q), q_stride_s, q_stride_b, q_stride_n, q_heads};
    const Heads<T> k_view{static_cast<T*>(k), k_stride_s, k_stride_b, k_stride_n, k ? k_heads : 0};
    with_truth(interleaved, [&](auto pairs) {
      rotate_all<pairs.value>(q_view, k_view, Table{cosines, sines, positions, table_rows}, sequence, batch, rotary_dim,
                              conjugate ? -1.0f : 1.0f, threads);
    });
  });
}

}  // namespace k2::cpu::K2_ISA
