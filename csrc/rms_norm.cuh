// What RMSNorm's forward and backward share: gamma, the types that it may have, the number of threads.
#pragma once
#include "primitives.cuh"

namespace k2::cuda {

constexpr int rms_norm_threads = 512;  // a block has at most these; leaves 65536 / 512 = 128 registers: nothing spills

// w of one vector of the row, packed as gamma is stored: G is T or, wider and then in two parts, float.
template <class T, class G>
struct Weight {
  static constexpr int part_width = Packed<G>::count;
  Packed<G> parts[Packed<T>::count / part_width];

  template <bool ALIGNED>
  __device__ __forceinline__ void load(const void* gamma, int index, int columns) {
    constexpr int count = Packed<T>::count / part_width;
#pragma unroll
    for (int part = 0; part < count; ++part)
      parts[part] = load_of_row<ALIGNED>(static_cast<const G*>(gamma), index * count + part, columns);
  }
  __device__ __forceinline__ float at(int j, float offset) const {
    return parts[j / part_width].at(j % part_width) + offset;
  }
};

// Calls body(TypeTag<T>, TypeTag<G>): the type of the activations, and gamma's, which is the same or float.
template <class Body>
int with_types(DType dtype, DType gamma_dtype, Body body) {
  return with_type(dtype, [&](auto tag) {
    if (gamma_dtype == dtype) return body(tag, tag);
    return gamma_dtype == DType::float32 ? body(tag, TypeTag<float>{}) : static_cast<int>(cudaErrorInvalidValue);
  });
}

}  // namespace k2::cuda
