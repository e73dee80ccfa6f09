// Stochastic rounding to bfloat16, the same bits on every device. Definition: dbkernels/philox.py.
#pragma once

#include <cstdint>

#include "philox.h"

namespace dbk {

constexpr uint32_t kRoundingStream = 2, kMomentStream = 3;

// The upper half of value + random·2^-16 units: up with the probability that keeps the mean. random: 16 bits.
// Infinity stays, NaN stays NaN.
DBK_INLINE uint16_t stochastic_bfloat16(float value, uint32_t random) {
  const uint32_t bits = float_to_bits(value);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  const uint32_t special = value != value ? 0x7FC0u : bits >> 16;
  return static_cast<uint16_t>(finite ? (bits + random) >> 16 : special);
}

}  // namespace dbk
