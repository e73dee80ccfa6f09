// Global-norm clipping, AdamW and EMA over a list of tensors on the CPU. Definition: dbkernels/_adamw_ema_definition.py.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "adamw_ema.h"
#include "cpu/draw.h"
#include "cpu/multi_tensor.h"
#include "cpu/simd.h"
#include "ops.h"
#include "rounding.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

struct Lists {
  const Tensors &params, &grads, &exp_avgs, &exp_avg_sqs, &emas, &masters;
  const std::vector<double>& weight_decay;
};

struct Settings {
  int64_t step;
  double lr, beta1, beta2, eps;
  std::optional<double> max_norm, ema_decay;
  bool stochastic;
  uint64_t seed;
  uint32_t offset;
};

// The factors of an update, alike for every element; C is the arithmetic's type.
template <typename C>
struct Rule {
  C clip, beta2, one_minus_beta1, one_minus_beta2, minus_step_size, root, eps, one_minus_ema;
  uint64_t seed;
  uint32_t offset;
};

// M: the moments' type, C or bfloat16.
template <typename T, typename M, typename C>
struct Span {
  T* param;
  const T* grad;
  M *exp_avg, *exp_avg_sq;
  C *ema, *master;
  int64_t count;
  C keep;          // 1 - lr·weight_decay
  uint64_t group;  // of the random words of the first eight elements
};

template <typename M, typename C>
constexpr bool kDrawnMoments = !std::is_same_v<M, C>;

// Products and sums are fused where torch's fused AdamW and lerp fuse them, so that float32 agrees to the last bits.
// random, moments: 16 and 32 bits for each element from `begin` on.
template <bool kHardware, bool kEma, Store kStore, typename T, typename M, typename C>
DBK_INLINE void update(const Span<T, M, C>& s, const Rule<C>& r, int64_t begin, int64_t end, const uint32_t* random,
                       const uint32_t* moments) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const C grad = load_as<C>(s.grad[i]) * r.clip, old_avg = load_as<C>(s.exp_avg[i]);
    const C exp_avg = fused<kHardware>(r.one_minus_beta1, grad - old_avg, old_avg);
    const C exp_avg_sq = fused<kHardware>(r.one_minus_beta2 * grad, grad, load_as<C>(s.exp_avg_sq[i]) * r.beta2);
    const C denominator = std::sqrt(exp_avg_sq) / r.root + r.eps;
    const C old = kStore == Store::kMaster ? s.master[i] : load_as<C>(s.param[i]);
    const C param = old * s.keep + r.minus_step_size * exp_avg / denominator;
    if constexpr (kDrawnMoments<M, C>) {
      s.exp_avg[i].x = stochastic_bfloat16(exp_avg, moments[i - begin] & 0xFFFFu);
      s.exp_avg_sq[i].x = stochastic_bfloat16(exp_avg_sq, moments[i - begin] >> 16);
    } else {
      s.exp_avg[i] = exp_avg;
      s.exp_avg_sq[i] = exp_avg_sq;
    }
    if constexpr (kStore == Store::kMaster) s.master[i] = param;
    if constexpr (kStore == Store::kStochastic) {
      s.param[i].x = stochastic_bfloat16(param, random[i - begin]);
    } else {
      store_as(s.param[i], param);
    }
    if constexpr (kEma) {
      // The average is of the master, or of the parameter as stored: a half type's rounding is part of it.
      const C now = kStore == Store::kMaster ? param : load_as<C>(s.param[i]);
      s.ema[i] = fused<kHardware>(r.one_minus_ema, now - s.ema[i], s.ema[i]);
    }
  }
}

// The words of kGroups groups in element order.
template <bool kAvx2, int kGroups>
DBK_INLINE void draw(uint32_t* words, uint64_t first, const Rule<float>& r, uint32_t stream) {
  uint32_t x[4][kGroups];
  draw_words<kAvx2>(x, first, r.seed, r.offset, stream);
  interleave<kAvx2>(x, words);
}

template <bool kAvx2, bool kEma, Store kStore, typename T, typename M, typename C>
DBK_INLINE void update_piece(const Span<T, M, C>& s, const Rule<C>& r) {
  constexpr bool kHardware = kAvx2 || kPlainFma, kDrawn = kDrawnMoments<M, C>;
  if constexpr (kStore == Store::kStochastic || kDrawn) {
    constexpr int kGroups = 16;
    for (int64_t at = 0; at < s.count; at += 8 * kGroups) {
      uint32_t words[4 * kGroups], random[8 * kGroups], moments[8 * kGroups];
      const uint64_t group = s.group + at / 8;
      if constexpr (kStore == Store::kStochastic) {
        draw<kAvx2, kGroups>(words, group, r, kRoundingStream);
        for (int k = 0; k < 4 * kGroups; ++k) {
          random[2 * k] = words[k] & 0xFFFFu;
          random[2 * k + 1] = words[k] >> 16;
        }
      }
      if constexpr (kDrawn) draw<kAvx2, 2 * kGroups>(moments, 2 * group, r, kMomentStream);
      const int64_t end = std::min<int64_t>(at + 8 * kGroups, s.count);
      update<kHardware, kEma, kStore>(s, r, at, end, random, moments);
    }
  } else {
    update<kHardware, kEma, kStore>(s, r, 0, s.count, nullptr, nullptr);
  }
}

template <bool kEma, Store kStore, typename T, typename M, typename C>
DBK_AVX2 void update_avx2(const Span<T, M, C>& s, const Rule<C>& r) {
  update_piece<true, kEma, kStore>(s, r);
}

template <bool kEma, Store kStore, typename T, typename M, typename C>
void update_portable(const Span<T, M, C>& s, const Rule<C>& r) {
  update_piece<false, kEma, kStore>(s, r);
}

template <typename T, typename M, typename C>
using Update = void (*)(const Span<T, M, C>&, const Rule<C>&);

template <bool kEma, Store kStore, typename T, typename M, typename C>
Update<T, M, C> built() {
  return use_avx2() ? update_avx2<kEma, kStore, T, M, C> : update_portable<kEma, kStore, T, M, C>;
}

template <bool kEma, typename T, typename M, typename C>
Update<T, M, C> update_for(Store store) {
  if constexpr (sizeof(T) == 2) {
    if (store == Store::kMaster) return built<kEma, Store::kMaster, T, M, C>();
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (store == Store::kStochastic) return built<kEma, Store::kStochastic, T, M, C>();
  }
  STD_TORCH_CHECK(store == Store::kNearest, "adamw_ema_step: masters are for half types, stochastic rounding for bfloat16");
  return built<kEma, Store::kNearest, T, M, C>();
}

template <typename T>
T* data(const Tensor& tensor, int64_t at) {
  return static_cast<T*>(tensor.data_ptr()) + at;
}

template <typename C>
Rule<C> rule_of(const Settings& s, C norm) {
  // clip_grads_with_norm_'s arithmetic and roundings: a reciprocal, then a product.
  const C clip = s.max_norm ? std::min<C>(C(1), C(1) / (norm + C(1e-6)) * C(*s.max_norm)) : C(1);
  const double correction1 = 1 - power(s.beta1, s.step), correction2 = 1 - power(s.beta2, s.step);
  return {clip,   C(s.beta2), C(1 - s.beta1), C(1 - s.beta2), C(-s.lr / correction1), C(std::sqrt(correction2)),
          C(s.eps), C(1 - s.ema_decay.value_or(1.0)), s.seed, s.offset};
}

template <typename T, typename M, typename C>
Tensor run(const Lists& l, const Settings& s, const std::optional<Tensor>& given, ScalarType wide) {
  const Index index(l.params);
  const C norm = given ? *data<const C>(*given, 0) : static_cast<C>(norm_of(l.grads, index));
  Tensor result = torch::stable::new_empty(l.exp_avgs[0], {}, wide);
  *data<C>(result, 0) = norm;
  if (!std::isfinite(norm)) return result;

  const Rule<C> rule = rule_of(s, norm);
  const bool ema = s.ema_decay.has_value() && !l.emas.empty();
  const Store store = !l.masters.empty() ? Store::kMaster : s.stochastic ? Store::kStochastic : Store::kNearest;
  const Update<T, M, C> body = ema ? update_for<true, T, M, C>(store) : update_for<false, T, M, C>(store);
  torch::stable::parallel_for(0, index.units(), 1, [&](int64_t begin, int64_t end) {
    // Backwards: the gradients that the norm read last are still in the cache.
    for (int64_t unit = end; unit-- > begin;) {
      index.pieces(unit, [&](size_t t, int64_t first, int64_t last) {
        body({data<T>(l.params[t], first), data<const T>(l.grads[t], first), data<M>(l.exp_avgs[t], first),
              data<M>(l.exp_avg_sqs[t], first), ema ? data<C>(l.emas[t], first) : nullptr,
              store == Store::kMaster ? data<C>(l.masters[t], first) : nullptr, last - first,
              C(1 - s.lr * l.weight_decay[t]), static_cast<uint64_t>(index.start(t) + first) / 8},
             rule);
      });
    }
  });
  return result;
}

// Params of a type whose arithmetic is float32.
template <typename T>
Tensor run_float(const Lists& l, const Settings& s, const std::optional<Tensor>& norm) {
  const bool bfloat16 = l.exp_avgs[0].scalar_type() == ScalarType::BFloat16;
  return (bfloat16 ? run<T, BFloat16, float> : run<T, float, float>)(l, s, norm, ScalarType::Float);
}

}  // namespace

Tensor adamw_ema_step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                          int64_t step, double lr, double beta1, double beta2, double eps,
                          std::vector<double> weight_decay, std::optional<double> max_norm,
                          std::optional<double> ema_decay, Tensors masters, bool stochastic_rounding, int64_t seed,
                          int64_t offset, std::optional<Tensor> norm) {
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, emas, masters, weight_decay};
  const Settings settings{step,     lr,        beta1,     beta2,
                          eps,      max_norm,  ema_decay, stochastic_rounding,
                          static_cast<uint64_t>(seed), static_cast<uint32_t>(offset)};
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return run_float<float>(lists, settings, norm);
    case ScalarType::Double: return run<double, double, double>(lists, settings, norm, ScalarType::Double);
    case ScalarType::BFloat16: return run_float<BFloat16>(lists, settings, norm);
    case ScalarType::Half: return run_float<Half>(lists, settings, norm);
    default: STD_TORCH_CHECK(false, "adamw_ema_step: params must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace dbk
