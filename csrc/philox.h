// Philox4x32-10 and Box-Muller by element index: the same numbers on every device, in every build.
//
// Definition and addressing: dbkernels/philox.py. Sources: Salmon et al., SC 2011; Box and Muller 1958. The polynomials
// are our own minimax fits over the ranges named beside them; dbkernels/triton/philox.py evaluates the same ones in the
// same order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DBK_INLINE __host__ __device__ __forceinline__
#else
#define DBK_INLINE inline __attribute__((always_inline))
#endif

namespace dbk {

constexpr uint32_t kNormalStream = 0, kUniformStream = 1;

struct Words {
  uint32_t x0, x1, x2, x3;
};

DBK_INLINE Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.x0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.x2;
    c = Words{uint32_t(p1 >> 32) ^ c.x1 ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.x3 ^ k1, uint32_t(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// a·b + c with one rounding. Without the instruction, float64 holds a·b exactly, and rounding its sum to float32 differs
// only where float64 rounded to a tie.
template <bool kHardware>
DBK_INLINE float fma32(float a, float b, float c) {
  if constexpr (kHardware) {
    return fmaf(a, b, c);
  } else {
    return static_cast<float>(static_cast<double>(a) * b + c);
  }
}

DBK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DBK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// -2·ln u for u in [2^-33, 1], within 0.9 ulp: u = 2^e·(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1], and
// ln(1 + f) = f - f²/2 + f³·Q(f), deg Q = 7.
template <bool kHardware>
DBK_INLINE float minus_two_log(float u) {
  const int32_t e = static_cast<int32_t>(float_to_bits(u) - 0x3F3504F3u) >> 23;
  const float f = bits_to_float(float_to_bits(u) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float q = -0.076342255f;
  q = fma32<kHardware>(q, f, 0.12761468f);
  q = fma32<kHardware>(q, f, -0.13160233f);
  q = fma32<kHardware>(q, f, 0.14201777f);
  q = fma32<kHardware>(q, f, -0.16623354f);
  q = fma32<kHardware>(q, f, 0.20001227f);
  q = fma32<kHardware>(q, f, -0.25000823f);
  q = fma32<kHardware>(q, f, 0.3333333f);
  q = fma32<kHardware>(q, f, -0.5f);
  const float exponent = static_cast<float>(e);
  // e·ln 2 in two parts, the first exact (355/512 times an integer), and the sum's rounding error carried along.
  const float whole = exponent * 0.693359375f;
  const float sum = whole + f;
  const float lost = (whole - sum) + f;
  return -2.0f * (sum + fma32<kHardware>(f * f, q, fma32<kHardware>(exponent, -2.12194440e-4f, lost)));
}

// Two normals from two words: radius from x0, angle from the upper 24 bits of x1, reduced to a quadrant in integers and
// to t in [-1/2, 1/2] exactly; sin and cos of t·pi/2 by polynomials in t².
template <bool kHardware>
DBK_INLINE void box_muller(uint32_t x0, uint32_t x1, float& first, float& second) {
  // Two halves, each exact in float32, added with one rounding: x0 rounded to nearest, but without an unsigned
  // conversion, which AVX2 lacks.
  const float high = static_cast<float>(static_cast<int32_t>(x0 >> 16)) * 65536.0f;
  const float low = static_cast<float>(static_cast<int32_t>(x0 & 0xFFFFu));
  const float u = (high + low) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrtf(minus_two_log<kHardware>(u));

  const int32_t angle = static_cast<int32_t>(x1 >> 8);
  const int32_t quadrant = (angle + (1 << 21)) >> 22;
  const float t = static_cast<float>(angle - (quadrant << 22)) * 0x1p-22f;
  const float t2 = t * t;
  float s = fma32<kHardware>(t2, -0.004604833f, 0.07968141f);
  s = fma32<kHardware>(s, t2, -0.6459636f);
  s = fma32<kHardware>(s, t2, -4.371139e-08f);  // the remainder of pi/2 beyond float32
  s = fma32<kHardware>(t, 1.5707964f, t * s);
  float c = fma32<kHardware>(t2, 0.00090402155f, -0.020860288f);
  c = fma32<kHardware>(c, t2, 0.25366923f);
  // 1 - t²·pi²/8 with its rounding error carried along: normals stay within 2 ulp of the definition (0.9 the logarithm's,
  // halved by the root, 0.5 the root, 0.8 this or sin, 0.5 the product; 2.41 from the true value at worst in 8 million
  // draws, 2.52 in 67 million; one draw in a hundred million was 3 ulp off).
  const float near = fma32<kHardware>(-1.2337005f, t2, 1.0f);
  const float lost = fma32<kHardware>(-1.2337005f, t2, 1.0f - near);
  c = near + fma32<kHardware>(c * t2, t2, lost);

  const float cosine = quadrant & 1 ? s : c;
  const float sine = quadrant & 1 ? c : s;
  // Signs by the quadrant's bits, moved to the sign bit: cos is negative in quadrants 1 and 2, sin in 2 and 3.
  const uint32_t flip_cos = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
  const uint32_t flip_sin = static_cast<uint32_t>(quadrant & 2) << 30;
  first = radius * bits_to_float(float_to_bits(cosine) ^ flip_cos);
  second = radius * bits_to_float(float_to_bits(sine) ^ flip_sin);
}

DBK_INLINE Words words_of_group(uint64_t group, uint64_t seed, uint32_t offset, uint32_t stream) {
  return philox4x32({uint32_t(group), uint32_t(group >> 32), offset, stream}, uint32_t(seed), uint32_t(seed >> 32));
}

// Uniform in (0, 1): 23 bits and a half fit float32 exactly, so no rounding can reach 0 or 1.
DBK_INLINE float uniform_of_word(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
}

// The four normals of group `group` (elements 4·group .. 4·group + 3).
template <bool kHardware>
DBK_INLINE void normals_of_group(uint64_t group, uint64_t seed, uint32_t offset, float& n0, float& n1, float& n2,
                                 float& n3) {
  const Words w = words_of_group(group, seed, offset, kNormalStream);
  box_muller<kHardware>(w.x0, w.x1, n0, n1);
  box_muller<kHardware>(w.x2, w.x3, n2, n3);
}

}  // namespace dbk
