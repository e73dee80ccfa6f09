// Registration of the CPU kernels, nothing else. The schemas are defined in Python (dbkernels/<op>.py), because the ops
// exist there whether or not this library was built.

#include <torch/csrc/stable/library.h>

#include "cpu/simd.h"
#include "facts.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dbkernels, CPU, m) {
  m.impl("inject_noise", TORCH_BOX(&dbk::inject_noise_cpu));
  m.impl("philox_uniform", TORCH_BOX(&dbk::philox_uniform_cpu));
  m.impl("sample_sigma", TORCH_BOX(&dbk::sample_sigma_cpu));
  m.impl("adamw_ema_step", TORCH_BOX(&dbk::adamw_ema_step_cpu));
}

namespace dbk {

Facts facts() {
  const char* plain = kPlainFma ? "portable with FMA" : "portable";
  return {"inject_noise,philox_uniform,sample_sigma,adamw_ema_step", "C++", use_avx2() ? "AVX2" : plain, __VERSION__};
}

}  // namespace dbk
