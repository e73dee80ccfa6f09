// Global-norm clipping, AdamW and EMA over a list of tensors on the GPU, with no host sync. Definition:
// dbkernels/adamw_ema.py.
//
// Three kernels: squares of each chunk of the gradients, one block that adds them up in a fixed order (so the norm's bits
// repeat) and decides, and the update, which reads the decision from device memory. What each block works on travels as
// kernel arguments, so nothing is copied to the device and a CUDA graph can hold the step.

#include <algorithm>
#include <cmath>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
constexpr int kPack = 4;           // elements a thread moves at once: 16 bytes of float32
constexpr int kChunk = 16384;      // elements a block takes
constexpr int kTensors = 36;       // tensors and blocks of one launch: what fits the 4 KiB of kernel arguments
constexpr int kBlocks = 320;

struct Batch {
  void *param[kTensors], *exp_avg[kTensors], *exp_avg_sq[kTensors], *ema[kTensors];
  const void* grad[kTensors];
  int64_t numel[kTensors];
  double keep[kTensors];  // 1 - lr·weight_decay
  int32_t chunk[kBlocks];
  uint8_t tensor[kBlocks];
  int blocks, first;  // first: this launch's place among all chunks
};
static_assert(sizeof(Batch) + 128 <= 4096, "kernel arguments hold 4 KiB before CUDA 12.1");

template <typename C>
struct Rule {
  C beta2, one_minus_beta1, one_minus_beta2, minus_step_size, root, eps, one_minus_ema;
};

// What the norm decided; read by the update.
template <typename C>
struct Decision {
  C clip;
  int update;
};

template <typename T>
struct alignas(sizeof(T) * kPack) Pack {
  T v[kPack];
};

template <typename C, typename T>
__device__ C widen(T value) {
  return static_cast<C>(value);
}

template <typename T>
__device__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
}

// Up to four elements, fewer at the end of a tensor.
template <typename T>
__device__ Pack<T> load(const T* from, int count, bool whole) {
  Pack<T> pack;
  if (whole) return *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
  for (int k = 0; k < kPack; ++k) pack.v[k] = k < count ? from[k] : T(0.0f);
  return pack;
}

template <typename T>
__device__ void store(T* to, const Pack<T>& pack, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    if (k < count) to[k] = pack.v[k];
  }
}

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

template <typename C>
__global__ void __launch_bounds__(kThreads) decide(const double* partial, int count, C max_norm, C* norm_out,
                                                   Decision<C>* decision) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const C norm = static_cast<C>(sqrt(sum));
  *norm_out = norm;
  decision->update = isfinite(norm);
  // max_norm < 0 stands for no clipping; 1e-6 as in torch.nn.utils.clip_grad_norm_.
  decision->clip = max_norm < C(0) ? C(1) : min(C(1), max_norm / (norm + C(1e-6)));
}

template <typename T, typename C, bool kEma>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Batch batch, const Rule<C> r,
                                                   const Decision<C>* decision) {
  if (!decision->update) return;
  const C clip = decision->clip;
  const int t = batch.tensor[blockIdx.x];
  const int64_t begin = int64_t{batch.chunk[blockIdx.x]} * kChunk;
  const int count = static_cast<int>(min(int64_t{kChunk}, batch.numel[t] - begin));
  T* param = static_cast<T*>(batch.param[t]) + begin;
  const T* grad = static_cast<const T*>(batch.grad[t]) + begin;
  C* exp_avg = static_cast<C*>(batch.exp_avg[t]) + begin;
  C* exp_avg_sq = static_cast<C*>(batch.exp_avg_sq[t]) + begin;
  C* ema = kEma ? static_cast<C*>(batch.ema[t]) + begin : nullptr;
  const C keep = static_cast<C>(batch.keep[t]);
  const bool packed = aligned<T>(param) && aligned<T>(grad) && aligned<C>(exp_avg) && aligned<C>(exp_avg_sq) &&
                      aligned<C>(ema);
  for (int i = threadIdx.x * kPack; i < count; i += kThreads * kPack) {
    const int left = count - i;
    const bool whole = packed && left >= kPack;
    Pack<T> p = load(param + i, left, whole);
    const Pack<T> g = load(grad + i, left, whole);
    Pack<C> m = load(exp_avg + i, left, whole), v = load(exp_avg_sq + i, left, whole), e{};
    if constexpr (kEma) e = load(ema + i, left, whole);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const C scaled = widen<C>(g.v[k]) * clip;
      m.v[k] = fma(r.one_minus_beta1, scaled - m.v[k], m.v[k]);
      v.v[k] = fma(r.one_minus_beta2 * scaled, scaled, v.v[k] * r.beta2);
      const C denominator = sqrt(v.v[k]) / r.root + r.eps;
      p.v[k] = T(fma(widen<C>(p.v[k]), keep, r.minus_step_size * m.v[k] / denominator));
      if constexpr (kEma) e.v[k] = fma(r.one_minus_ema, widen<C>(p.v[k]) - e.v[k], e.v[k]);
    }
    store(param + i, p, left, whole);
    store(exp_avg + i, m, left, whole);
    store(exp_avg_sq + i, v, left, whole);
    if constexpr (kEma) store(ema + i, e, left, whole);
  }
}

struct Lists {
  const Tensors &params, &grads, &exp_avgs, &exp_avg_sqs, &emas;
  const std::vector<double>& weight_decay;
  double lr;
};

// Cut the lists into chunks of kChunk elements and the chunks into launches.
std::vector<Batch> batches(const Lists& lists) {
  std::vector<Batch> all;
  int chunks = 0, slots = kTensors;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const int64_t numel = lists.params[i].numel();
    bool placed = false;
    for (int64_t at = 0; at < numel; at += kChunk, ++chunks) {
      const bool full = all.empty() || all.back().blocks == kBlocks || (!placed && slots == kTensors);
      if (full) {
        all.emplace_back();
        all.back().first = chunks;
        slots = 0;
      }
      Batch& batch = all.back();
      if (full || !placed) {
        batch.param[slots] = lists.params[i].data_ptr();
        batch.grad[slots] = lists.grads[i].data_ptr();
        batch.exp_avg[slots] = lists.exp_avgs[i].data_ptr();
        batch.exp_avg_sq[slots] = lists.exp_avg_sqs[i].data_ptr();
        batch.ema[slots] = lists.emas.empty() ? nullptr : lists.emas[i].data_ptr();
        batch.numel[slots] = numel;
        batch.keep[slots++] = 1 - lists.lr * lists.weight_decay[i];
        placed = true;
      }
      batch.tensor[batch.blocks] = static_cast<uint8_t>(slots - 1);
      batch.chunk[batch.blocks++] = static_cast<int32_t>(at / kChunk);
    }
  }
  return all;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T, typename C>
Tensor run(const Lists& lists, const Rule<C>& rule, std::optional<double> max_norm, bool ema, ScalarType wide) {
  const torch::stable::accelerator::DeviceGuard guard(lists.params[0].get_device_index());
  const cudaStream_t stream = current_stream(lists.params[0]);
  const std::vector<Batch> work = batches(lists);
  const int chunks = work.empty() ? 0 : work.back().first + work.back().blocks;
  Tensor norm = torch::stable::new_empty(lists.exp_avgs[0], {}, wide);
  // The chunks' sums, then the decision, in one piece of float64 memory.
  Tensor scratch = torch::stable::new_empty(lists.exp_avgs[0], {chunks + 2}, ScalarType::Double);
  double* partial = static_cast<double*>(scratch.data_ptr());
  auto* decision = reinterpret_cast<Decision<C>*>(partial + chunks);
  for (const Batch& batch : work) {
    squares<T, C><<<batch.blocks, kThreads, 0, stream>>>(batch, partial);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  decide<C><<<1, kThreads, 0, stream>>>(partial, chunks, C(max_norm.value_or(-1.0)),
                                        static_cast<C*>(norm.data_ptr()), decision);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  for (const Batch& batch : work) {
    (ema ? update<T, C, true> : update<T, C, false>)<<<batch.blocks, kThreads, 0, stream>>>(batch, rule, decision);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return norm;
}

}  // namespace

Tensor adamw_ema_step_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                           int64_t step, double lr, double beta1, double beta2, double eps,
                           std::vector<double> weight_decay, std::optional<double> max_norm,
                           std::optional<double> ema_decay) {
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, emas, weight_decay, lr};
  const bool ema = ema_decay.has_value() && !emas.empty();
  const auto rule = [&](auto zero) {
    using C = decltype(zero);
    return Rule<C>{C(beta2), C(1 - beta1), C(1 - beta2), C(-lr / (1 - std::pow(beta1, step))),
                   C(std::sqrt(1 - std::pow(beta2, step))), C(eps), C(1 - ema_decay.value_or(1.0))};
  };
  switch (params[0].scalar_type()) {
    case ScalarType::Float: return run<float, float>(lists, rule(0.0f), max_norm, ema, ScalarType::Float);
    case ScalarType::Double: return run<double, double>(lists, rule(0.0), max_norm, ema, ScalarType::Double);
    case ScalarType::BFloat16: return run<__nv_bfloat16, float>(lists, rule(0.0f), max_norm, ema, ScalarType::Float);
    case ScalarType::Half: return run<__half, float>(lists, rule(0.0f), max_norm, ema, ScalarType::Float);
    default: STD_TORCH_CHECK(false, "adamw_ema_step: params must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace dbk
