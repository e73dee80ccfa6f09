// Global-norm clipping, AdamW and EMA over a list of tensors on the GPU, with no host sync. Definition:
// dbkernels/_adamw_ema_definition.py.
//
// Three kernels: squares of each chunk of the gradients, one block that adds them up in a fixed order (so the norm's bits
// repeat), decides and works out the step's factors, and the update, which reads them from device memory. A norm that is
// given takes the place of the first and of the sum.

#include <cmath>
#include <type_traits>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "adamw_ema.h"
#include "cuda/multi_tensor.h"
#include "ops.h"
#include "rounding.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

// A number of the step: its value, or its address on the device.
template <typename T>
struct Number {
  T value;
  T* at;
};

template <typename T>
__device__ T value_of(const Number<T>& number) {
  return number.at == nullptr ? number.value : *number.at;
}

struct Numbers {
  Number<int64_t> step;
  Number<double> lr, ema_decay;
  Number<int64_t> seed, offset;
  double beta1, beta2, eps, max_norm;  // max_norm < 0: no clipping
};

// The factors of an update, alike for every element, and whether to make it: written by `decide`.
template <typename C>
struct Rule {
  C clip, beta2, one_minus_beta1, one_minus_beta2, minus_step_size, root, eps, one_minus_ema;
  double lr;
  uint64_t seed;
  uint32_t offset;
  int update;
};

// Sum over a block in a fixed order; the result is thread 0's.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, d);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  }
  return total;
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) squares(const __grid_constant__ Batch batch, double* partial) {
  const int t = batch.tensor[blockIdx.x];
  const int64_t begin = int64_t{batch.chunk[blockIdx.x]} * kChunk;
  const int count = static_cast<int>(min(int64_t{kChunk}, batch.numel[t] - begin));
  const T* grad = static_cast<const T*>(batch.grad[t]) + begin;
  const bool packed = aligned<T>(grad);
  double sum = 0.0;
  for (int i = threadIdx.x * kPack; i < count; i += kThreads * kPack) {
    const Pack<T> g = load(grad + i, count - i, packed && i + kPack <= count);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const double x = widen<C>(g.v[k]);
      sum = fma(x, x, sum);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[batch.first + blockIdx.x] = sum;
}

// given: the norm, or null to take it of `count` partial sums.
template <typename C>
__global__ void __launch_bounds__(kThreads) decide(const double* partial, int count, const C* given, const Numbers n,
                                                   C* norm_out, Rule<C>* rule) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const C norm = given == nullptr ? static_cast<C>(sqrt(sum)) : *given;
  *norm_out = norm;
  const int64_t step = value_of(n.step);
  const double lr = value_of(n.lr);
  Rule<C> r;
  r.update = isfinite(norm);
  // A skipped update doesn't count.
  if (n.step.at != nullptr) *n.step.at = step + r.update;
  // 1e-6 and the roundings of torch.nn.utils.clip_grads_with_norm_: a reciprocal, then a product.
  r.clip = n.max_norm < 0 ? C(1) : min(C(1), C(1) / (norm + C(1e-6)) * C(n.max_norm));
  r.beta2 = C(n.beta2);
  r.one_minus_beta1 = C(1 - n.beta1);
  r.one_minus_beta2 = C(1 - n.beta2);
  r.minus_step_size = C(-(lr / (1 - power(n.beta1, step))));
  r.root = C(sqrt(1 - power(n.beta2, step)));
  r.eps = C(n.eps);
  r.one_minus_ema = C(1 - value_of(n.ema_decay));
  r.lr = lr;
  r.seed = static_cast<uint64_t>(value_of(n.seed));
  r.offset = static_cast<uint32_t>(value_of(n.offset));
  *rule = r;
}

// Stored as T, from four elements that begin at `first` of their tensor.
template <Store kStore, typename T, typename C>
__device__ Pack<T> rounded(const Pack<C>& value, uint64_t group, int64_t first, const Rule<C>& r) {
  Pack<T> stored;
  if constexpr (kStore == Store::kStochastic) {
    const Words w = words_of_group(group + first / 8, r.seed, r.offset, kRoundingStream);
    const uint32_t low = first % 8 == 0 ? w.x0 : w.x2, high = first % 8 == 0 ? w.x1 : w.x3;
    const uint32_t random[kPack] = {low & 0xFFFFu, low >> 16, high & 0xFFFFu, high >> 16};
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      stored.v[k] = __ushort_as_bfloat16(stochastic_bfloat16(value.v[k], random[k]));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) stored.v[k] = narrow<T>(value.v[k]);
  }
  return stored;
}

template <typename T, typename C, bool kEma, Store kStore>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Batch batch, const Rule<C>* rule) {
  constexpr bool kMaster = kStore == Store::kMaster;
  const Rule<C> r = *rule;
  if (!r.update) return;
  const int t = batch.tensor[blockIdx.x];
  const int64_t begin = int64_t{batch.chunk[blockIdx.x]} * kChunk;
  const int count = static_cast<int>(min(int64_t{kChunk}, batch.numel[t] - begin));
  T* param = static_cast<T*>(batch.param[t]) + begin;
  const T* grad = static_cast<const T*>(batch.grad[t]) + begin;
  C* exp_avg = static_cast<C*>(batch.exp_avg[t]) + begin;
  C* exp_avg_sq = static_cast<C*>(batch.exp_avg_sq[t]) + begin;
  C* ema = kEma ? static_cast<C*>(batch.ema[t]) + begin : nullptr;
  C* master = kMaster ? static_cast<C*>(batch.master[t]) + begin : nullptr;
  const C keep = static_cast<C>(1 - product(r.lr, batch.decay[t]));
  const bool packed = aligned<T>(param) && aligned<T>(grad) && aligned<C>(exp_avg) && aligned<C>(exp_avg_sq) &&
                      aligned<C>(ema) && aligned<C>(master);
  for (int i = threadIdx.x * kPack; i < count; i += kThreads * kPack) {
    const int left = count - i;
    const bool whole = packed && left >= kPack;
    Pack<C> p, m = load(exp_avg + i, left, whole), v = load(exp_avg_sq + i, left, whole), e{};
    const Pack<T> g = load(grad + i, left, whole);
    if constexpr (kEma) e = load(ema + i, left, whole);
    if constexpr (kMaster) {
      p = load(master + i, left, whole);
    } else {
      const Pack<T> old = load(param + i, left, whole);
#pragma unroll
      for (int k = 0; k < kPack; ++k) p.v[k] = widen<C>(old.v[k]);
    }
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const C scaled = widen<C>(g.v[k]) * r.clip;
      m.v[k] = fma(r.one_minus_beta1, scaled - m.v[k], m.v[k]);
      v.v[k] = fma(r.one_minus_beta2 * scaled, scaled, v.v[k] * r.beta2);
      const C denominator = sqrt(v.v[k]) / r.root + r.eps;
      p.v[k] = fma(p.v[k], keep, r.minus_step_size * m.v[k] / denominator);
    }
    const Pack<T> stored = rounded<kStore, T>(p, batch.group[t], begin + i, r);
    if constexpr (kEma) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        // The average is of the master, or of the parameter as stored.
        const C now = kMaster ? p.v[k] : widen<C>(stored.v[k]);
        e.v[k] = fma(r.one_minus_ema, now - e.v[k], e.v[k]);
      }
      store(ema + i, e, left, whole);
    }
    store(param + i, stored, left, whole);
    if constexpr (kMaster) store(master + i, p, left, whole);
    store(exp_avg + i, m, left, whole);
    store(exp_avg_sq + i, v, left, whole);
  }
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T, typename C>
using Update = void (*)(Batch, const Rule<C>*);

template <typename T, typename C, bool kEma>
Update<T, C> update_for(Store store) {
  if constexpr (sizeof(T) == 2) {
    if (store == Store::kMaster) return update<T, C, kEma, Store::kMaster>;
  }
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (store == Store::kStochastic) return update<T, C, kEma, Store::kStochastic>;
  }
  STD_TORCH_CHECK(store == Store::kNearest, "adamw_ema_step: masters are for half types, stochastic rounding for bfloat16");
  return update<T, C, kEma, Store::kNearest>;
}

template <typename T>
T* place(const std::optional<Tensor>& number) {
  return number ? static_cast<T*>(number->data_ptr()) : nullptr;
}

template <typename T, typename C>
Tensor run(const Lists& lists, const Numbers& numbers, const std::optional<Tensor>& given, bool ema, Store store,
           ScalarType wide) {
  const torch::stable::accelerator::DeviceGuard guard(lists.params[0].get_device_index());
  const cudaStream_t stream = current_stream(lists.params[0]);
  const std::vector<Batch> work = batches(lists);
  const int chunks = work.empty() ? 0 : work.back().first + work.back().blocks;
  Tensor norm = torch::stable::new_empty(lists.exp_avgs[0], {}, wide);
  // The chunks' sums, then the rule, in one piece of float64 memory.
  constexpr int kRule = (sizeof(Rule<C>) + sizeof(double) - 1) / sizeof(double);
  Tensor scratch = torch::stable::new_empty(lists.exp_avgs[0], {chunks + kRule}, ScalarType::Double);
  double* partial = static_cast<double*>(scratch.data_ptr());
  auto* rule = reinterpret_cast<Rule<C>*>(partial + chunks);
  if (!given) {
    for (const Batch& batch : work) {
      squares<T, C><<<batch.blocks, kThreads, 0, stream>>>(batch, partial);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  decide<C><<<1, kThreads, 0, stream>>>(partial, given ? 0 : chunks, place<const C>(given), numbers,
                                        static_cast<C*>(norm.data_ptr()), rule);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Update<T, C> kernel = ema ? update_for<T, C, true>(store) : update_for<T, C, false>(store);
  for (const Batch& batch : work) {
    kernel<<<batch.blocks, kThreads, 0, stream>>>(batch, rule);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return norm;
}

}  // namespace

Tensor adamw_ema_step_capturable_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                                      Tensors emas, int64_t step, double lr, double beta1, double beta2, double eps,
                                      std::vector<double> weight_decay, std::optional<double> max_norm,
                                      std::optional<double> ema_decay, Tensors masters, bool stochastic_rounding,
                                      int64_t seed, int64_t offset, std::optional<Tensor> norm,
                                      std::optional<Tensor> step_tensor, std::optional<Tensor> lr_tensor,
                                      std::optional<Tensor> ema_decay_tensor, std::optional<Tensor> seed_tensor,
                                      std::optional<Tensor> offset_tensor) {
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, emas, masters, weight_decay};
  const Numbers numbers{{step, place<int64_t>(step_tensor)},
                        {lr, place<double>(lr_tensor)},
                        {ema_decay.value_or(1.0), place<double>(ema_decay_tensor)},
                        {seed, place<int64_t>(seed_tensor)},
                        {offset, place<int64_t>(offset_tensor)},
                        beta1,
                        beta2,
                        eps,
                        max_norm.value_or(-1.0)};
  const bool ema = ema_decay.has_value() && !emas.empty();
  const Store store = !masters.empty() ? Store::kMaster : stochastic_rounding ? Store::kStochastic : Store::kNearest;
  const auto call = [&](auto stored, auto zero, ScalarType wide) {
    return run<decltype(stored), decltype(zero)>(lists, numbers, norm, ema, store, wide);
  };
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return call(float{}, 0.0f, ScalarType::Float);
    case ScalarType::Double: return call(double{}, 0.0, ScalarType::Double);
    case ScalarType::BFloat16: return call(__nv_bfloat16{}, 0.0f, ScalarType::Float);
    case ScalarType::Half: return call(__half{}, 0.0f, ScalarType::Float);
    default: STD_TORCH_CHECK(false, "adamw_ema_step: params must be float16, bfloat16, float32 or float64");
  }
}

Tensor adamw_ema_step_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                           int64_t step, double lr, double beta1, double beta2, double eps,
                           std::vector<double> weight_decay, std::optional<double> max_norm,
                           std::optional<double> ema_decay, Tensors masters, bool stochastic_rounding, int64_t seed,
                           int64_t offset, std::optional<Tensor> norm) {
  return adamw_ema_step_capturable_cuda(params, grads, exp_avgs, exp_avg_sqs, emas, step, lr, beta1, beta2, eps,
                                        weight_decay, max_norm, ema_decay, masters, stochastic_rounding, seed, offset,
                                        norm, {}, {}, {}, {}, {});
}

}  // namespace dbk
