// Entry points of the kernel files, for bindings.cpp. Schemas: dbkernels/<op>.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace dbk {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Tensor inject_noise_cpu(const Tensor& y, const Tensor& sigma, std::optional<double> sigma_data, int64_t seed,
                        int64_t offset);

// indices: int64; sigma: in the arithmetic's type.
Tensor inject_noise_table_cpu(const Tensor& indices, const Tensor& table, const Tensor& sigma,
                              std::optional<double> sigma_data, bool normalize, int64_t seed, int64_t offset);
Tensor inject_noise_table_grad_cpu(const Tensor& grad, const Tensor& indices, const Tensor& table, const Tensor& sigma,
                                   std::optional<double> sigma_data, bool normalize);

// out: float32, contiguous.
void philox_uniform_cpu(Tensor out, int64_t seed, int64_t offset);

// x, branch, h and gradients (O, I, D); shift, scale, gate (O, 1, D); weight, bias (D,). -> out, mean, rstd
std::tuple<Tensor, Tensor, Tensor> ada_norm_cpu(const Tensor& x, std::optional<Tensor> shift,
                                                std::optional<Tensor> scale, std::optional<Tensor> weight,
                                                std::optional<Tensor> bias, double eps, bool rms);

// -> dx, sums (2, O, 1, D)
std::tuple<Tensor, Tensor> ada_norm_backward_cpu(const Tensor& grad, const Tensor& x, std::optional<Tensor> scale,
                                                 std::optional<Tensor> weight, const Tensor& mean, const Tensor& rstd);

// -> h, out, mean, rstd
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_cpu(
    const Tensor& x, const Tensor& branch, const Tensor& gate, std::optional<Tensor> shift, std::optional<Tensor> scale,
    std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, bool rms);

// -> dx, dbranch, sums (3, O, 1, D)
std::tuple<Tensor, Tensor, Tensor> gated_residual_norm_backward_cpu(
    const Tensor& grad, std::optional<Tensor> grad_h, const Tensor& h, const Tensor& branch, const Tensor& gate,
    std::optional<Tensor> scale, std::optional<Tensor> weight, const Tensor& mean, const Tensor& rstd);

// F, z and y alike in shape; sigma in the arithmetic's type, one level for each equal run of elements. z: none to draw it
// again; z_scaled: it is times c_in. -> loss, and the gradients of F, z and y at an upstream gradient of 1, each empty
// unless requested
std::tuple<Tensor, Tensor, Tensor, Tensor> edm_loss_cpu(const Tensor& F, std::optional<Tensor> z, const Tensor& y,
                                                        const Tensor& sigma, double sigma_data, std::string reduction,
                                                        bool z_scaled, int64_t seed, int64_t offset, bool want_F,
                                                        bool want_z, bool want_y);

// x *= by, in place: a factor for each equal run of elements. x: contiguous.
void edm_loss_scale_cpu(Tensor x, const Tensor& by);

// logits: (R, V) with rows of adjacent elements, overwritten; target: (R,) int64, -1 for none; factor: (R,) or none; out:
// the gradient's destination, if not the logits' place. -> losses (R,)
Tensor cross_entropy_rows_cpu(Tensor logits, const Tensor& target, std::optional<Tensor> factor, std::optional<Tensor> out);

// Tensors of any floating dtypes and strides, at least one. -> 0-dim, float32 (float64 with any float64)
Tensor total_norm_cpu(Tensors tensors);

// All tensors contiguous; params and grads of one dtype, the others float32 (float64 for float64). masters: empty, or one per
// parameter. norm: what to clip by and whether to update, 0-dim, in the moments' dtype; none to take it of grads. -> the norm
Tensor adamw_ema_step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                          int64_t step, double lr, double beta1, double beta2, double eps,
                          std::vector<double> weight_decay, std::optional<double> max_norm,
                          std::optional<double> ema_decay, Tensors masters, bool stochastic_rounding, int64_t seed,
                          int64_t offset, std::optional<Tensor> norm);

Tensor adamw_ema_step_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors emas,
                           int64_t step, double lr, double beta1, double beta2, double eps,
                           std::vector<double> weight_decay, std::optional<double> max_norm,
                           std::optional<double> ema_decay, Tensors masters, bool stochastic_rounding, int64_t seed,
                           int64_t offset, std::optional<Tensor> norm);

// The same with numbers that lie on the device where a tensor is given: 0-dim, int64 or float64. The step is advanced.
Tensor adamw_ema_step_capturable_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                                      Tensors emas, int64_t step, double lr, double beta1, double beta2, double eps,
                                      std::vector<double> weight_decay, std::optional<double> max_norm,
                                      std::optional<double> ema_decay, Tensors masters, bool stochastic_rounding,
                                      int64_t seed, int64_t offset, std::optional<Tensor> norm,
                                      std::optional<Tensor> step_tensor, std::optional<Tensor> lr_tensor,
                                      std::optional<Tensor> ema_decay_tensor, std::optional<Tensor> seed_tensor,
                                      std::optional<Tensor> offset_tensor);

}  // namespace dbk
