// What each kernel file offers to bindings.cpp. Schemas: dbkernels/<op>.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace dbk {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Tensor inject_noise_cpu(const Tensor& y, const Tensor& sigma, std::optional<double> sigma_data, int64_t seed,
                        int64_t offset);

// out: float32, contiguous.
void philox_uniform_cpu(Tensor out, int64_t seed, int64_t offset);

// out: float32, contiguous; plan: what dbkernels.sample_sigma.plan says.
void sample_sigma_cpu(Tensor out, Tensor plan, int64_t seed, int64_t offset);

// All tensors contiguous; params and grads of one dtype, the others float32 (float64 for float64).
Tensor adamw_ema_step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                          int64_t step, double lr, double beta1, double beta2, double eps,
                          std::vector<double> weight_decay, std::optional<double> max_norm,
                          std::optional<double> ema_decay);

Tensor adamw_ema_step_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                           int64_t step, double lr, double beta1, double beta2, double eps,
                           std::vector<double> weight_decay, std::optional<double> max_norm,
                           std::optional<double> ema_decay);

}  // namespace dbk
