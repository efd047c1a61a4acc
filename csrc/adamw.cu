// AdamW (Loshchilov & Hutter 2019) over all parameters in as few launches as their table fits, in torch's order:
//
//   g = gradient * gradient_scale
//   p *= 1 - lr * weight_decay;  m += (g - m) * (1 - beta1);  v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + epsilon);  model copy = round(p)
//
// Bytes per parameter: 12 read, 12 written, and 2 or 4 for the gradient and for the model's copy: every tensor once.
// Constants are formed on the host in double; the scale of the gradient (clipping) stays on the device, so that nobody
// waits for the norm.
#include <cmath>

#include "multi_tensor.cuh"

namespace k2::cuda {
namespace {

constexpr int width = 4;  // elements of a vector: 16 bytes of the fp32 state, 8 of the gradient and the copy in 16 bits

enum List { parameter, gradient, first_moment, second_moment, model_copy, lists };

struct Constants {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction, epsilon;
};

// The group that begins at `group`, where all of it is there and aligned.
template <class T>
__device__ __forceinline__ void load_whole_group(const T* group, float (&values)[multi_tensor_group]) {
  VectorWords<width, T> words[Group<width>::vectors];
#pragma unroll
  for (int i = 0; i < Group<width>::vectors; ++i)
    words[i] = load_words<VectorWords<width, T>, Cache::streamed>(group + i * Group<width>::stride);
#pragma unroll
  for (int i = 0; i < Group<width>::vectors; ++i) unpack_vector<width, T>(words[i], values + i * width);
}

template <class G, class M>
__global__ void __launch_bounds__(multi_tensor_threads)
    adamw_kernel(const __grid_constant__ TensorTable<lists> table, Constants c, const float* gradient_scale) {
  constexpr int group = multi_tensor_group;
  const Part part(table);
  const auto address = [&](List list) { return table.addresses[list][part.tensor]; };
  auto* p_of = reinterpret_cast<float*>(address(parameter)) + part.first;
  auto* m_of = reinterpret_cast<float*>(address(first_moment)) + part.first;
  auto* v_of = reinterpret_cast<float*>(address(second_moment)) + part.first;
  const auto* g_of = reinterpret_cast<const G*>(address(gradient)) + part.first;
  auto* copy_of = address(model_copy) == 0 ? nullptr : reinterpret_cast<M*>(address(model_copy)) + part.first;
  const float scale = gradient_scale == nullptr ? 1.0f : *gradient_scale;

  const int size = static_cast<int>(part.size);
  for (int first = Group<width>::first(); first < size; first += multi_tensor_threads * group) {
    float p[group], m[group], v[group], g[group];
    const auto load_all = [&](auto load) { load(p_of, p), load(m_of, m), load(v_of, v), load(g_of, g); };
    const auto is_whole = [&](const auto* chunk) { return Group<width>::is_whole(chunk, first, size); };
    // One branch for all four: their loads are under way together, with no code for elements between them.
    if (is_whole(p_of) && is_whole(m_of) && is_whole(v_of) && is_whole(g_of))
      load_all([&](const auto* chunk, float (&values)[group]) { load_whole_group(chunk + first, values); });
    else load_all([&](const auto* chunk, float (&values)[group]) { load_group<width>(chunk, first, size, values); });
#pragma unroll
    for (int i = 0; i < group; ++i) {
      const float gradient = g[i] * scale;
      m[i] += (gradient - m[i]) * c.one_minus_beta1;
      v[i] = c.beta2 * v[i] + c.one_minus_beta2 * gradient * gradient;
      p[i] = p[i] * c.decay - c.step_size * m[i] / (sqrtf(v[i]) * c.inverse_correction + c.epsilon);
    }
    store_group<width>(p_of, first, size, p);
    store_group<width>(m_of, first, size, m);
    store_group<width>(v_of, first, size, v);
    if (copy_of != nullptr) store_group<width>(copy_of, first, size, p);
  }
}

}  // namespace

int adamw(const int64_t* parameters, const int64_t* gradients, const int64_t* exp_avg, const int64_t* exp_avg_sq,
          const int64_t* model_copies, const int64_t* sizes, int64_t count, double learning_rate, double beta1,
          double beta2, double epsilon, double weight_decay, int64_t step, const float* gradient_scale,
          DType gradient_dtype, DType model_dtype, void* stream) {
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step)),
               correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  const Constants constants{static_cast<float>(1.0 - learning_rate * weight_decay),
                            static_cast<float>(1.0 - beta1),
                            static_cast<float>(beta2),
                            static_cast<float>(1.0 - beta2),
                            static_cast<float>(learning_rate / correction1),
                            static_cast<float>(1.0 / std::sqrt(correction2)),
                            static_cast<float>(epsilon)};
  const int64_t* const all[lists] = {parameters, gradients, exp_avg, exp_avg_sq, model_copies};
  return with_type(gradient_dtype, [&](auto g) {
    return with_type(model_dtype, [&](auto m) {
      using G = typename decltype(g)::type;
      using M = typename decltype(m)::type;
      return for_each_table(all, sizes, count, [&](const TensorTable<lists>& table, int64_t blocks) {
        return launch(adamw_kernel<G, M>, blocks, dim3(multi_tensor_threads), 0, stream, table, constants,
                      gradient_scale);
      });
    });
  });
}

}  // namespace k2::cuda
