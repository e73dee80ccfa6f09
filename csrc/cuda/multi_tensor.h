// A list of tensors cut into chunks, and the chunks into launches, for kernels that update a whole parameter list. What each
// block works on travels as kernel arguments, so nothing is copied to the device and a CUDA graph can hold the step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ops.h"

namespace dbk {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;           // elements a thread moves at once: 16 bytes of float32
constexpr int kChunk = 16384;      // elements a block takes
constexpr int kTensors = 32;       // tensors and blocks of one launch: what fits the 4 KiB of kernel arguments
constexpr int kBlocks = 320;

struct Batch {
  void *param[kTensors], *exp_avg[kTensors], *exp_avg_sq[kTensors], *ema[kTensors], *master[kTensors];
  const void* grad[kTensors];
  uint64_t group[kTensors];  // of the random words of a tensor's first eight elements
  int64_t numel[kTensors];
  double decay[kTensors];
  int32_t chunk[kBlocks];
  uint8_t tensor[kBlocks];
  int blocks, first;  // first: this launch's place among all chunks
};
static_assert(sizeof(Batch) + 128 <= 4096, "kernel arguments hold 4 KiB before CUDA 12.1");

struct Lists {
  const Tensors &params, &grads, &exp_avgs, &exp_avg_sqs, &emas, &masters;
  const std::vector<double>& weight_decay;
};

// Cut the lists into chunks of kChunk elements and the chunks into launches.
std::vector<Batch> batches(const Lists& lists) {
  std::vector<Batch> all;
  int chunks = 0, slots = kTensors;
  uint64_t group = 0;
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
        batch.master[slots] = lists.masters.empty() ? nullptr : lists.masters[i].data_ptr();
        batch.group[slots] = group;
        batch.numel[slots] = numel;
        batch.decay[slots++] = lists.weight_decay[i];
        placed = true;
      }
      batch.tensor[batch.blocks] = static_cast<uint8_t>(slots - 1);
      batch.chunk[batch.blocks++] = static_cast<int32_t>(at / kChunk);
    }
    group += static_cast<uint64_t>(numel + 7) / 8;
  }
  return all;
}

template <typename T>
struct alignas(sizeof(T) * kPack) Pack {
  T v[kPack];
};

// Conversions by name: torch compiles with the half types' implicit ones off (cpp_extension.COMMON_NVCC_FLAGS).
template <typename C, typename T>
__device__ C widen(T value) {
  return static_cast<C>(value);
}
template <>
__device__ inline float widen<float, __half>(__half value) {
  return __half2float(value);
}
template <>
__device__ inline float widen<float, __nv_bfloat16>(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// To nearest, ties to even.
template <typename T, typename C>
__device__ T narrow(C value) {
  return static_cast<T>(value);
}
template <>
__device__ inline __half narrow<__half, float>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
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
  for (int k = 0; k < kPack; ++k) pack.v[k] = k < count ? from[k] : narrow<T>(0.0f);
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

}  // namespace
}  // namespace dbk
