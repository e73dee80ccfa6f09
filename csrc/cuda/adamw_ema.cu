// Global-norm clipping, AdamW and EMA over a list of tensors on the GPU, with no host sync. Definition:
// dbkernels/_adamw_ema_definition.py.
//
// Three kernels: squares of each chunk of the gradients, one block that adds them up in a fixed order (so the norm's bits
// repeat), decides and works out the step's factors, and the update, which reads them from device memory. A norm that is
// given takes the place of the first and of the sum.

#include <type_traits>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda/adamw_ema_kernels.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename C>
using Update = void (*)(Batch, const Rule<C>*);

template <typename T, typename M, typename C, bool kEma>
Update<C> update_for(Store store) {
  if constexpr (sizeof(T) == 2) {
    if (store == Store::kMaster) return update<T, M, C, kEma, Store::kMaster>;
  }
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (store == Store::kStochastic) return update<T, M, C, kEma, Store::kStochastic>;
  }
  STD_TORCH_CHECK(store == Store::kNearest, "adamw_ema_step: masters are for half types, stochastic rounding for bfloat16");
  return update<T, M, C, kEma, Store::kNearest>;
}

template <typename T>
T* place(const std::optional<Tensor>& number) {
  return number ? static_cast<T*>(number->data_ptr()) : nullptr;
}

template <typename T, typename C>
Tensor run(const Lists& lists, const Numbers& numbers, const std::optional<Tensor>& given, Update<C> kernel,
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
  const auto call = [&](auto param, auto moment, auto zero, ScalarType wide) {
    using T = decltype(param);
    using M = decltype(moment);
    using C = decltype(zero);
    const auto kernel = ema ? update_for<T, M, C, true>(store) : update_for<T, M, C, false>(store);
    return run<T, C>(lists, numbers, norm, kernel, wide);
  };
  const auto call_float = [&](auto param) {
    if (exp_avgs[0].scalar_type() != ScalarType::BFloat16) return call(param, 0.0f, 0.0f, ScalarType::Float);
    return call(param, __nv_bfloat16{}, 0.0f, ScalarType::Float);
  };
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return call_float(float{});
    case ScalarType::Double: return call(double{}, 0.0, 0.0, ScalarType::Double);
    case ScalarType::BFloat16: return call_float(__nv_bfloat16{});
    case ScalarType::Half: return call_float(__half{});
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
