// Registration of the CUDA kernels, nothing else: a library of its own, since it needs libtorch_cuda.

#include <torch/csrc/stable/library.h>

#include "facts.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dbkernels, CUDA, m) {
  m.impl("adamw_ema_step", TORCH_BOX(&dbk::adamw_ema_step_cuda));
  m.impl("adamw_ema_step.capturable", TORCH_BOX(&dbk::adamw_ema_step_capturable_cuda));
}

namespace dbk {

Facts facts() { return {"adamw_ema_step", "CUDA C++", "multi-tensor", __VERSION__}; }

}  // namespace dbk
