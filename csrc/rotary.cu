// Rotary position embedding (Su et al. 2021) of q and k, in place or into other memory, in one launch; the backward is
// the same with -sin.
//
//   first' = first * cos - second * sin,  second' = second * cos + first * sin
//   pairs (x[i], x[i + R/2]), or (x[2i], x[2i+1]) when interleaved; elements from R on are copied, in place untouched
//
// Bytes per bf16 element: 4, the least possible, on the strided views that the QKV GEMM's output offers: no copy before
// or after. A thread owns one chunk of the head dimension of one token: it loads cos and sin once and walks the heads
// with them, two heads at a time, which is four 16-byte loads on their way (half-rotation) or two (interleaved).
#include "primitives.cuh"

namespace k2::cuda {
namespace {

constexpr int block_threads = 128;
constexpr int most_chunk_lanes = 64;
constexpr int heads_per_thread = 4;  // enough to repay the loads of cos and sin

struct Strides {
  int64_t s, b, n;
};

template <class T>
struct Heads {
  const T* from;
  Strides from_strides;
  T* to;
  Strides to_strides;
  int count;
};

template <class T>
struct Arguments {
  Heads<T> q, k;
  const float *cosines, *sines;  // [table_rows, pairs]
  const int32_t* positions;      // [tokens] or null
  int64_t table_rows, tokens, batch;
  int pairs, chunks, chunk_lanes, groups, lanes;  // lanes = chunk_lanes * groups threads share one token
  int tail;                                       // elements from R on, to be copied
  bool conjugate;
};

// A chunk is what one thread rotates at once. VECTOR, half-rotation: one 16-byte vector of each half; interleaved: one.
// Otherwise one pair.
template <class T, bool VECTOR, bool INTERLEAVED>
struct Chunk {
  static constexpr int pairs = !VECTOR ? 1 : INTERLEAVED ? Packed<T>::count / 2 : Packed<T>::count;
  static constexpr int parts = INTERLEAVED ? 1 : 2;
  Packed<T> vectors[VECTOR ? parts : 1];
  T elements[2];  // where it is no vector

  __device__ __forceinline__ void load(const T* head, int chunk, int half) {
    if constexpr (VECTOR) {
#pragma unroll
      for (int part = 0; part < parts; ++part)
        vectors[part] = load_packed(head + part * half + chunk * Packed<T>::count);
    } else {
      elements[0] = head[INTERLEAVED ? 2 * chunk : chunk];
      elements[1] = head[INTERLEAVED ? 2 * chunk + 1 : half + chunk];
    }
  }

  __device__ __forceinline__ void rotate_and_store(const float (&cosine)[pairs], const float (&sine)[pairs], T* head,
                                                   int chunk, int half) const {
    float rotated[2 * pairs];  // as they lie in memory: pairs, or one half after the other
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int one = INTERLEAVED ? 2 * i : i, other = INTERLEAVED ? 2 * i + 1 : pairs + i;
      const float a = element(one), b = element(other);
      rotated[one] = a * cosine[i] - b * sine[i];
      rotated[other] = b * cosine[i] + a * sine[i];
    }
    if constexpr (VECTOR) {
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        float values[Packed<T>::count];
#pragma unroll
        for (int i = 0; i < Packed<T>::count; ++i) values[i] = rotated[part * Packed<T>::count + i];
        store_packed(head + part * half + chunk * Packed<T>::count, pack<T>(values));
      }
    } else {
      head[INTERLEAVED ? 2 * chunk : chunk] = from_float<T>(rotated[0]);
      head[INTERLEAVED ? 2 * chunk + 1 : half + chunk] = from_float<T>(rotated[1]);
    }
  }

 private:
  __device__ __forceinline__ float element(int i) const {
    if constexpr (VECTOR) return vectors[i / Packed<T>::count].at(i % Packed<T>::count);
    else return to_float(elements[i]);
  }
};

template <class T, bool VECTOR, bool INTERLEAVED>
__global__ void __launch_bounds__(block_threads) rotary_kernel(Arguments<T> a) {
  using Part = Chunk<T, VECTOR, INTERLEAVED>;
  const int tokens_per_block = block_threads / a.lanes, slot = threadIdx.x / a.lanes,
            lane = threadIdx.x - slot * a.lanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * tokens_per_block + slot;
  if (slot >= tokens_per_block || token >= a.tokens) return;
  const int64_t s = token / a.batch, b = token - s * a.batch;
  const int64_t position = a.positions != nullptr ? a.positions[token] : s;
  const bool known = position >= 0 && position < a.table_rows;
  const int64_t q_at = s * a.q.from_strides.s + b * a.q.from_strides.b,
                to_q_at = s * a.q.to_strides.s + b * a.q.to_strides.b,
                k_at = s * a.k.from_strides.s + b * a.k.from_strides.b,
                to_k_at = s * a.k.to_strides.s + b * a.k.to_strides.b;
  const int heads = a.q.count + a.k.count, group = lane / a.chunk_lanes;
  const auto from_head = [&](int head) {
    return head < a.q.count ? a.q.from + q_at + head * a.q.from_strides.n
                            : a.k.from + k_at + (head - a.q.count) * a.k.from_strides.n;
  };
  const auto to_head = [&](int head) {
    return head < a.q.count ? a.q.to + to_q_at + head * a.q.to_strides.n
                            : a.k.to + to_k_at + (head - a.q.count) * a.k.to_strides.n;
  };

  for (int chunk = lane - group * a.chunk_lanes; chunk < a.chunks; chunk += a.chunk_lanes) {
    float cosine[Part::pairs], sine[Part::pairs];
    if (known) {
      load_floats(a.cosines + position * a.pairs + chunk * Part::pairs, cosine);
      load_floats(a.sines + position * a.pairs + chunk * Part::pairs, sine);
    }
    Part first, second;
    const auto load_two = [&](int head) {
      if (head < heads) first.load(from_head(head), chunk, a.pairs);
      if (head + a.groups < heads) second.load(from_head(head + a.groups), chunk, a.pairs);
    };
    load_two(group);  // beside the tables' values, which only then are waited for
#pragma unroll
    for (int i = 0; i < Part::pairs; ++i) {
      if (!known) cosine[i] = sine[i] = nanf("");
      if (a.conjugate) sine[i] = -sine[i];
    }
    for (int head = group; head < heads; head += 2 * a.groups) {
      if (head != group) load_two(head);
      first.rotate_and_store(cosine, sine, to_head(head), chunk, a.pairs);
      if (head + a.groups < heads)
        second.rotate_and_store(cosine, sine, to_head(head + a.groups), chunk, a.pairs);
    }
  }
  for (int i = lane - group * a.chunk_lanes; i < a.tail; i += a.chunk_lanes)
    for (int head = group; head < heads; head += a.groups)
      to_head(head)[2 * a.pairs + i] = from_head(head)[2 * a.pairs + i];
}

template <class T>
bool is_vectorisable(const Heads<T>& heads) {
  const auto whole = [](const Strides& strides) {
    constexpr int width = Packed<T>::count;
    return strides.s % width == 0 && strides.b % width == 0 && strides.n % width == 0;
  };
  return heads.count == 0 ||
         (is_aligned(heads.from) && is_aligned(heads.to) && whole(heads.from_strides) && whole(heads.to_strides));
}

template <class T, bool VECTOR, bool INTERLEAVED>
int start(Arguments<T> a, void* stream) {
  a.chunks = a.pairs / Chunk<T, VECTOR, INTERLEAVED>::pairs;
  a.chunk_lanes = a.chunks < most_chunk_lanes ? a.chunks : most_chunk_lanes;
  const int wanted_groups = divide_up(a.q.count + a.k.count, heads_per_thread),
            most_groups = block_threads / a.chunk_lanes;
  a.groups = wanted_groups < most_groups ? wanted_groups : most_groups;
  a.lanes = a.chunk_lanes * a.groups;
  const int64_t blocks = divide_up<int64_t>(a.tokens, block_threads / a.lanes);
  return launch(rotary_kernel<T, VECTOR, INTERLEAVED>, blocks, dim3(block_threads), 0, stream, a);
}

}  // namespace

int rotary(const void* q, int64_t q_stride_s, int64_t q_stride_b, int64_t q_stride_n, void* to_q, int64_t to_q_stride_s,
           int64_t to_q_stride_b, int64_t to_q_stride_n, const void* k, int64_t k_stride_s, int64_t k_stride_b,
           int64_t k_stride_n, void* to_k, int64_t to_k_stride_s, int64_t to_k_stride_b, int64_t to_k_stride_n,
           const float* cosines, const float* sines, const int32_t* positions, int64_t table_rows, int64_t sequence,
           int64_t batch, int64_t q_heads, int64_t k_heads, int64_t head_dim, int64_t rotary_dim, bool interleaved,
           bool conjugate, DType dtype, void* stream) {
  if (sequence * batch * (q_heads + k_heads) * rotary_dim == 0) return cudaSuccess;
  return with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Arguments<T> a{};
    a.q = {static_cast<const T*>(q), {q_stride_s, q_stride_b, q_stride_n}, static_cast<T*>(to_q),
           {to_q_stride_s, to_q_stride_b, to_q_stride_n}, static_cast<int>(q_heads)};
    a.k = {static_cast<const T*>(k), {k_stride_s, k_stride_b, k_stride_n}, static_cast<T*>(to_k),
           {to_k_stride_s, to_k_stride_b, to_k_stride_n}, static_cast<int>(k_heads)};
    a.tail = q == to_q && k == to_k ? 0 : static_cast<int>(head_dim - rotary_dim);
    a.cosines = cosines, a.sines = sines, a.positions = positions, a.table_rows = table_rows;
    a.tokens = sequence * batch, a.batch = batch, a.pairs = static_cast<int>(rotary_dim / 2), a.conjugate = conjugate;
    const int64_t vector_span = interleaved ? rotary_dim : rotary_dim / 2;  // what must be whole vectors
    const bool vector = vector_span % Packed<T>::count == 0 && a.pairs % 4 == 0 && is_vectorisable(a.q) &&
                        is_vectorisable(a.k) && is_aligned(cosines) && is_aligned(sines);
    if (interleaved) return vector ? start<T, true, true>(a, stream) : start<T, false, true>(a, stream);
    return vector ? start<T, true, false>(a, stream) : start<T, false, false>(a, stream);
  });
}

}  // namespace k2::cuda
