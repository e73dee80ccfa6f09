// Shared by the CPU's and the GPU's adamw_ema_step. Definition: dbkernels/_adamw_ema_definition.py.
#pragma once

#include <cstdint>

#include "philox.h"

namespace dbk {

// How a new parameter is stored: rounded to nearest; in its float32 master, and rounded from there; rounded up or down at
// random.
enum class Store { kNearest, kMaster, kStochastic };

// A product that no compiler fuses into a sum.
DBK_INLINE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// base^exponent by squaring: the products that every form of the op takes, so that all have the same bits.
DBK_INLINE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1, base = product(base, base)) {
    if (exponent & 1) result = product(result, base);
  }
  return result;
}

}  // namespace dbk
