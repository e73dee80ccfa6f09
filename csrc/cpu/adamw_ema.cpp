// Global-norm clipping, AdamW and EMA over a list of tensors on the CPU. Definition: dbkernels/adamw_ema.py.

#include <algorithm>
#include <cmath>
#include <numeric>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/simd.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

// Work is cut into chunks of fixed size whatever the thread count, so the norm's sum has one order and its bits repeat.
constexpr int64_t kChunk = 8192;

struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Chunk> cut(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    for (int64_t at = 0; at < numel; at += kChunk) chunks.push_back({i, at, std::min(numel, at + kChunk)});
  }
  return chunks;
}

// What a step does to one element; C is the arithmetic's type.
template <typename C>
struct Rule {
  C clip, beta2, one_minus_beta1, one_minus_beta2, minus_step_size, root, eps, one_minus_ema;
};

template <typename T, typename C>
struct Span {
  T* param;
  const T* grad;
  C *exp_avg, *exp_avg_sq, *ema;
  int64_t count;
  C keep;  // 1 - lr·weight_decay
};

template <typename T, typename C>
DBK_INLINE double squares(const T* grad, int64_t count) {
  // Eight running sums: the loop vectorises, and float64 keeps a billion squares exact to far below float32's last bit.
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) {
      const double g = load_as<C>(grad[i + k]);
      sums[k] += g * g;
    }
  }
  for (; i < count; ++i) {
    const double g = load_as<C>(grad[i]);
    sums[i % 8] += g * g;
  }
  return std::accumulate(sums, sums + 8, 0.0);
}

// Products and sums are fused where torch's fused AdamW and lerp fuse them, so that float32 agrees to the last bits.
template <bool kHardware, bool kEma, typename T, typename C>
DBK_INLINE void update(const Span<T, C>& s, const Rule<C>& r) {
#pragma omp simd
  for (int64_t i = 0; i < s.count; ++i) {
    const C grad = load_as<C>(s.grad[i]) * r.clip;
    const C exp_avg = fused<kHardware>(r.one_minus_beta1, grad - s.exp_avg[i], s.exp_avg[i]);
    const C exp_avg_sq = fused<kHardware>(r.one_minus_beta2 * grad, grad, s.exp_avg_sq[i] * r.beta2);
    const C denominator = std::sqrt(exp_avg_sq) / r.root + r.eps;
    const C param = load_as<C>(s.param[i]) * s.keep + r.minus_step_size * exp_avg / denominator;
    s.exp_avg[i] = exp_avg;
    s.exp_avg_sq[i] = exp_avg_sq;
    store_as(s.param[i], param);
    // The average is of the parameter as stored: a half type's rounding is part of it.
    if constexpr (kEma) {
      s.ema[i] = fused<kHardware>(r.one_minus_ema, load_as<C>(s.param[i]) - s.ema[i], s.ema[i]);
    }
  }
}

template <typename T, typename C>
DBK_AVX2 double squares_avx2(const T* grad, int64_t count) {
  return squares<T, C>(grad, count);
}

template <typename T, typename C>
double squares_portable(const T* grad, int64_t count) {
  return squares<T, C>(grad, count);
}

template <bool kEma, typename T, typename C>
DBK_AVX2 void update_avx2(const Span<T, C>& s, const Rule<C>& r) {
  update<true, kEma>(s, r);
}

template <bool kEma, typename T, typename C>
void update_portable(const Span<T, C>& s, const Rule<C>& r) {
  update<kPlainFma, kEma>(s, r);
}

template <typename T>
T* data(const Tensor& tensor, int64_t at) {
  return static_cast<T*>(tensor.data_ptr()) + at;
}

template <typename T, typename C>
double norm_of(const Tensors& grads, const std::vector<Chunk>& chunks) {
  std::vector<double> partial(chunks.size());
  const auto sum = use_avx2() ? squares_avx2<T, C> : squares_portable<T, C>;
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
      partial[i] = sum(data<const T>(grads[chunk.tensor], chunk.begin), chunk.end - chunk.begin);
    }
  });
  return std::sqrt(std::accumulate(partial.begin(), partial.end(), 0.0));
}

template <typename T, typename C>
Tensor run(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
           const Tensors& emas, int64_t step, double lr, double beta1, double beta2, double eps,
           const std::vector<double>& weight_decay, std::optional<double> max_norm, std::optional<double> ema_decay) {
  const std::vector<Chunk> chunks = cut(params);
  const C norm = static_cast<C>(norm_of<T, C>(grads, chunks));
  Tensor result = torch::stable::new_empty(exp_avgs[0], {});
  *data<C>(result, 0) = norm;
  if (!std::isfinite(norm)) return result;

  // clip_grad_norm_'s arithmetic: the coefficient is rounded to the gradients' compute type.
  const C clip = max_norm ? std::min<C>(C(1), C(*max_norm) / (norm + C(1e-6))) : C(1);
  const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
  const Rule<C> rule{clip, C(beta2), C(1 - beta1), C(1 - beta2), C(-lr / correction1), C(std::sqrt(correction2)),
                     C(eps), C(1 - ema_decay.value_or(1.0))};
  const bool ema = ema_decay.has_value() && !emas.empty();
  const auto with = use_avx2() ? update_avx2<true, T, C> : update_portable<true, T, C>;
  const auto without = use_avx2() ? update_avx2<false, T, C> : update_portable<false, T, C>;
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [t, at, stop] = chunks[i];
      const Span<T, C> span{data<T>(params[t], at),       data<const T>(grads[t], at),
                            data<C>(exp_avgs[t], at),     data<C>(exp_avg_sqs[t], at),
                            ema ? data<C>(emas[t], at) : nullptr, stop - at,
                            C(1 - lr * weight_decay[t])};
      (ema ? with : without)(span, rule);
    }
  });
  return result;
}

}  // namespace

Tensor adamw_ema_step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                          int64_t step, double lr, double beta1, double beta2, double eps,
                          std::vector<double> weight_decay, std::optional<double> max_norm,
                          std::optional<double> ema_decay) {
  const auto call = [&](auto run_typed) {
    return run_typed(params, grads, exp_avgs, exp_avg_sqs, emas, step, lr, beta1, beta2, eps, weight_decay, max_norm,
                     ema_decay);
  };
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return call(run<float, float>);
    case ScalarType::Double: return call(run<double, double>);
    case ScalarType::BFloat16: return call(run<BFloat16, float>);
    case ScalarType::Half: return call(run<Half, float>);
    default: STD_TORCH_CHECK(false, "adamw_ema_step: params must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace dbk
