// Kernels of the GPU's adamw_ema_step: the squares of each chunk of the gradients, one block that decides and works out the
// step's factors, and the update. The launches: adamw_ema.cu.
#pragma once

#include <cmath>
#include <type_traits>

#include <cuda_runtime.h>

#include "adamw_ema.h"
#include "cuda/multi_tensor.h"
#include "rounding.h"

namespace dbk {
namespace {

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

// The moments rounded at random, from four elements that begin at `first` of their tensor.
template <typename M>
__device__ void round_moments(const Pack<float>& m, const Pack<float>& v, uint64_t group, int64_t first,
                              const Rule<float>& r, Pack<M>& exp_avg, Pack<M>& exp_avg_sq) {
  const Words w = words_of_group(2 * group + first / 4, r.seed, r.offset, kMomentStream);
  const uint32_t random[kPack] = {w.x0, w.x1, w.x2, w.x3};
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    exp_avg.v[k] = __ushort_as_bfloat16(stochastic_bfloat16(m.v[k], random[k] & 0xFFFFu));
    exp_avg_sq.v[k] = __ushort_as_bfloat16(stochastic_bfloat16(v.v[k], random[k] >> 16));
  }
}

// M: the moments' type, C or bfloat16.
template <typename T, typename M, typename C, bool kEma, Store kStore>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Batch batch, const Rule<C>* rule) {
  constexpr bool kMaster = kStore == Store::kMaster;
  const Rule<C> r = *rule;
  if (!r.update) return;
  const int t = batch.tensor[blockIdx.x];
  const int64_t begin = int64_t{batch.chunk[blockIdx.x]} * kChunk;
  const int count = static_cast<int>(min(int64_t{kChunk}, batch.numel[t] - begin));
  T* param = static_cast<T*>(batch.param[t]) + begin;
  const T* grad = static_cast<const T*>(batch.grad[t]) + begin;
  M* exp_avg = static_cast<M*>(batch.exp_avg[t]) + begin;
  M* exp_avg_sq = static_cast<M*>(batch.exp_avg_sq[t]) + begin;
  C* ema = kEma ? static_cast<C*>(batch.ema[t]) + begin : nullptr;
  C* master = kMaster ? static_cast<C*>(batch.master[t]) + begin : nullptr;
  const C keep = static_cast<C>(1 - product(r.lr, batch.decay[t]));
  const bool packed = aligned<T>(param) && aligned<T>(grad) && aligned<M>(exp_avg) && aligned<M>(exp_avg_sq) &&
                      aligned<C>(ema) && aligned<C>(master);
  for (int i = threadIdx.x * kPack; i < count; i += kThreads * kPack) {
    const int left = count - i;
    const bool whole = packed && left >= kPack;
    Pack<M> old_avg = load(exp_avg + i, left, whole), old_sq = load(exp_avg_sq + i, left, whole);
    Pack<C> p, m, v, e{};
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
      const C before = widen<C>(old_avg.v[k]);
      m.v[k] = fma(r.one_minus_beta1, scaled - before, before);
      v.v[k] = fma(r.one_minus_beta2 * scaled, scaled, widen<C>(old_sq.v[k]) * r.beta2);
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
    if constexpr (std::is_same_v<M, C>) {
      old_avg = m;
      old_sq = v;
    } else {
      round_moments(m, v, batch.group[t], begin + i, r, old_avg, old_sq);
    }
    store(exp_avg + i, old_avg, left, whole);
    store(exp_avg_sq + i, old_sq, left, whole);
  }
}

}  // namespace
}  // namespace dbk
