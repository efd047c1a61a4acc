// AdamW over a list of tensors: the CPU twin of csrc/adamw.cu. The equations are in ops.h.
//
// Memory traffic per element: reads parameter, gradient and both moments, writes parameter and moments, and the model's
// copy where there is one: 28 bytes in fp32, 28 with bf16 gradients and copies.
#include <cmath>

#include "tensor_list.h"

namespace k2::cpu::K2_ISA {
namespace {

// The scalars of one step, formed in fp64.
struct Step {
  float gradient_scale, decay, one_minus_beta1, beta2, one_minus_beta2, rate, inverse_correction2, epsilon;
};

template <class Gradient, class Model>
void update(float* parameter, const Gradient* gradient, float* exp_avg, float* exp_avg_sq, Model* model, int64_t length,
            const Step& step) {
  for_lanes(length, [&](int64_t i, auto lanes) {
    const Vec g = load(gradient + i, lanes) * splat(step.gradient_scale);
    Vec m = load(exp_avg + i, lanes), v = load(exp_avg_sq + i, lanes);
    m = fma(g - m, splat(step.one_minus_beta1), m);
    v = fma(g * g, splat(step.one_minus_beta2), v * splat(step.beta2));
    const Vec denominator = fma(sqrt(v), splat(step.inverse_correction2), splat(step.epsilon));
    const Vec p = load(parameter + i, lanes) * splat(step.decay) - splat(step.rate) * m / denominator;
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    store(parameter + i, p, lanes);
    if (model) store(model + i, p, lanes);
  });
}

}  // namespace

void adamw(const int64_t* parameters, const int64_t* gradients, const int64_t* exp_avg, const int64_t* exp_avg_sq,
           const int64_t* model_copies, const int64_t* sizes, int64_t count, double learning_rate, double beta1,
           double beta2, double epsilon, double weight_decay, int64_t step, const float* gradient_scale,
           DType gradient_dtype, DType model_dtype, int threads) {
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  const Step scalars{gradient_scale ? *gradient_scale : 1.0f,
                     static_cast<float>(1.0 - learning_rate * weight_decay),
                     static_cast<float>(1.0 - beta1),
                     static_cast<float>(beta2),
                     static_cast<float>(1.0 - beta2),
                     static_cast<float>(learning_rate / correction1),
                     static_cast<float>(1.0 / std::sqrt(correction2)),
                     static_cast<float>(epsilon)};
  constexpr int64_t kBytesPerElement = 28;
  with_type(gradient_dtype, [&](auto gradient_element) {
    with_type(model_dtype, [&](auto model_element) {
      using Gradient = decltype(gradient_element);
      using Model = decltype(model_element);
      for_chunks(sizes, count, kBytesPerElement, threads, [&](int64_t tensor, int64_t begin, int64_t length, int64_t) {
        Model* model = model_copies ? tensor_at<Model>(model_copies, tensor) : nullptr;
        update(tensor_at<float>(parameters, tensor) + begin, tensor_at<const Gradient>(gradients, tensor) + begin,
               tensor_at<float>(exp_avg, tensor) + begin, tensor_at<float>(exp_avg_sq, tensor) + begin,
               model ? model + begin : nullptr, length, scalars);
      });
    });
  });
}

}  // namespace k2::cpu::K2_ISA
