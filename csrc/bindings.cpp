// Registration of the CPU kernels, nothing else. The schemas are defined in Python (dbkernels/<op>.py), because the ops
// exist there with or without this library.

#include <torch/csrc/stable/library.h>

#include "cpu/simd.h"
#include "facts.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dbkernels, CPU, m) {
  m.impl("inject_noise", TORCH_BOX(&dbk::inject_noise_cpu));
  m.impl("inject_noise_table", TORCH_BOX(&dbk::inject_noise_table_cpu));
  m.impl("inject_noise_table_grad", TORCH_BOX(&dbk::inject_noise_table_grad_cpu));
  m.impl("philox_uniform", TORCH_BOX(&dbk::philox_uniform_cpu));
  m.impl("edm_loss", TORCH_BOX(&dbk::edm_loss_cpu));
  m.impl("edm_loss_scale_", TORCH_BOX(&dbk::edm_loss_scale_cpu));
  m.impl("ada_norm", TORCH_BOX(&dbk::ada_norm_cpu));
  m.impl("ada_norm_backward", TORCH_BOX(&dbk::ada_norm_backward_cpu));
  m.impl("gated_residual_norm", TORCH_BOX(&dbk::gated_residual_norm_cpu));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&dbk::gated_residual_norm_backward_cpu));
  m.impl("total_norm", TORCH_BOX(&dbk::total_norm_cpu));
  m.impl("adamw_ema_step", TORCH_BOX(&dbk::adamw_ema_step_cpu));
  m.impl("cross_entropy_rows", TORCH_BOX(&dbk::cross_entropy_rows_cpu));
}

namespace dbk {

constexpr const char* kOps =
    "inject_noise,inject_noise_table,inject_noise_table_grad,philox_uniform,edm_loss,edm_loss_scale_,"
    "ada_norm,ada_norm_backward,gated_residual_norm,gated_residual_norm_backward,"
    "total_norm,adamw_ema_step,cross_entropy_rows";

Facts facts() {
  const char* plain = kPlainFma ? "portable with FMA" : "portable";
  return {kOps, "C++", use_avx2() ? "AVX2" : plain, __VERSION__};
}

}  // namespace dbk
