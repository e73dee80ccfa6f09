// One source, two builds: portable, and AVX2 with FMA chosen when the processor has them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DBK_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define DBK_AVX2
#endif

namespace dbk {

// Whether the plain build already has a fused multiply-add (64-bit Arm, or x86 built for a newer target).
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kPlainFma = true;
#else
constexpr bool kPlainFma = false;
#endif

// DBKERNELS_CPU=portable selects the portable build on any processor, for tests and for bisecting.
inline bool use_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool chosen = [] {
    const char* wish = std::getenv("DBKERNELS_CPU");
    const bool portable = wish != nullptr && std::strcmp(wish, "portable") == 0;
    return !portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return chosen;
#else
  return false;
#endif
}

// a·b + c with one rounding, as at::vec::fmadd does it; float64 without the instruction rounds twice.
template <bool kHardware, typename C>
DBK_INLINE C fused(C a, C b, C c) {
  if constexpr (sizeof(C) == sizeof(float)) {
    return fma32<kHardware>(a, b, c);
  } else if constexpr (kHardware) {
    return __builtin_fma(a, b, c);
  } else {
    return a * b + c;
  }
}

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Conversions in integer arithmetic and without branches, so that loops over them vectorise.
template <typename C, typename T>
DBK_INLINE C load_as(const T& value) {
  return static_cast<C>(value);
}

template <>
DBK_INLINE float load_as<float, BFloat16>(const BFloat16& value) {
  return bits_to_float(static_cast<uint32_t>(value.x) << 16);
}

template <>
DBK_INLINE float load_as<float, Half>(const Half& value) {
  const uint32_t exponent = value.x & 0x7C00u, magnitude = (value.x & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + (112u << 23), beyond = magnitude + (224u << 23);  // beyond: infinity and NaN
  const uint32_t tiny = float_to_bits(static_cast<float>(static_cast<int32_t>(value.x & 0x3FFu)) * 0x1p-24f);
  const uint32_t bits = exponent == 0 ? tiny : exponent == 0x7C00u ? beyond : normal;
  return bits_to_float(bits | (value.x & 0x8000u) << 16);
}

template <typename T, typename C>
DBK_INLINE void store_as(T& to, C value) {
  to = static_cast<T>(value);
}

template <>
DBK_INLINE void store_as<BFloat16, float>(BFloat16& to, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.x = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

template <>
DBK_INLINE void store_as<Half, float>(Half& to, float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t rounded = ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t normal = rounded < 0x7C00u ? rounded : 0x7C00u;  // from 65520 on, infinity
  const uint32_t tiny = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;  // 0.5's last place is 2^-24
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  to.x = static_cast<uint16_t>((value != value ? 0x7E00u : finite) | (bits >> 16 & 0x8000u));
}

}  // namespace dbk
