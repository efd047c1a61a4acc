// The squared norm and the scaling of a list of tensors: the CPU twin of csrc/gradient_norm.cu. Definitions are in
// ops.h.
#include "prefetch.h"
#include "tensor_list.h"

namespace k2::cpu::K2_ISA {
namespace {

constexpr int64_t kAhead = 1024;  // elements that are asked for before they are added

// Four sums, so that an addition need not wait for the one before it.
template <class T>
double sum_of_squares(const T* values, int64_t length) {
  SquareSum sums[4] = {no_squares(), no_squares(), no_squares(), no_squares()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) {
    prefetch(values + i, kAhead, 4 * kLanes);
    add_squares(sums[0], sums[1], values + i);
    add_squares(sums[2], sums[3], values + i + 2 * kLanes);
  }
  for_lanes(length - i, [&](int64_t rest, auto lanes) { add_squares(sums[0], load(values + i + rest, lanes)); });
  double lane[kLanes], other[kLanes];
  lanes_of(sums[0], lane);
  for (int sum = 1; sum < 4; ++sum) {
    lanes_of(sums[sum], other);
    for (int k = 0; k < kLanes; ++k) lane[k] += other[k];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}

template <class T>
double count_not_finite(const T* values, int64_t length) {
  int64_t found = 0;
  for_lanes(length, [&](int64_t i, auto lanes) {
    float lane[kLanes];
    store(lane, load(values + i, lanes), Full{});
    for (float value : lane) found += !__builtin_isfinite(value);
  });
  return static_cast<double>(found);
}

}  // namespace

int64_t squared_norm_workspace(const int64_t* sizes, int64_t count) { return 2 * chunks_of(sizes, count); }

// workspace [2, chunks]: each chunk's sum and count, added up in order afterwards. Finite elements cannot overflow an
// fp64 sum of fp32 squares, so only chunks whose sum is not finite are searched.
void squared_norm(const int64_t* tensors, const int64_t* sizes, int64_t count, double* workspace, double* result,
                  DType dtype, int threads) {
  const int64_t chunks = chunks_of(sizes, count);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    for_chunks(sizes, count, sizeof(T), threads, [&](int64_t tensor, int64_t begin, int64_t length, int64_t chunk) {
      const T* values = tensor_at<const T>(tensors, tensor) + begin;
      const double sum = sum_of_squares(values, length);
      workspace[chunk] = sum;
      workspace[chunks + chunk] = __builtin_isfinite(sum) ? 0.0 : count_not_finite(values, length);
    });
  });
  result[0] = result[1] = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    result[0] += workspace[chunk];
    result[1] += workspace[chunks + chunk];
  }
}

void scale(const int64_t* tensors, const int64_t* sizes, int64_t count, const float* factor, DType dtype, int threads) {
  if (*factor == 1.0f) return;
  const Vec by = splat(*factor);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    for_chunks(sizes, count, 2 * sizeof(T), threads, [&](int64_t tensor, int64_t begin, int64_t length, int64_t) {
      T* values = tensor_at<T>(tensors, tensor) + begin;
      for_lanes(length, [&](int64_t i, auto lanes) { store(values + i, load(values + i, lanes) * by, lanes); });
    });
  });
}

}  // namespace k2::cpu::K2_ISA
