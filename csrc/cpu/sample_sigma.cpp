// Truncated log-normal noise levels by address on the CPU. Definition: dbkernels/sample_sigma.py.
//
// float64 throughout. Logarithm and exponential are their series, cut where float32 can't see it, so that the loop
// vectorises.

#include <algorithm>
#include <cmath>

#include <torch/csrc/stable/ops.h>

#include "cpu/draw.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dbk {
namespace {

constexpr int kGroups = 16;         // groups of four levels computed together
constexpr int64_t kGrain = 32;      // such blocks a thread takes at least: some 20 us of work
constexpr double kLn2 = 0.6931471805599453, kShift = 0x1.8p52;

// What dbkernels.sample_sigma.plan makes of a range: the probability below, inside and above it, the density, and its
// outermost float32 numbers.
struct Plan {
  double below, inside, above, P_mean, P_std, low, high, ln_low, ln_high;
};

DBK_INLINE double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DBK_INLINE uint64_t to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ln p within 2e-12 of itself: p = 2^e·(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1], ln(1 + f) = 2·artanh(f / (2 + f)).
template <bool kHardware>
DBK_INLINE double log_of(double p) {
  const uint64_t bits = to_bits(p) - 0x3FE6A09E667F3BCDu + (uint64_t{1023} << 52);
  // The exponent in the mantissa of 2^52 and subtracted from it: AVX2 has no conversion of 64-bit integers.
  const double e = from_bits((bits >> 52) | 0x4330000000000000u) - (0x1p52 + 1023);
  const double f = from_bits((bits & 0xFFFFFFFFFFFFFu) + 0x3FE6A09E667F3BCDu) - 1.0;
  const double s = f / (2.0 + f), z = s * s;
  double q = fused<kHardware>(1.0 / 13, z, 1.0 / 11);
  q = fused<kHardware>(q, z, 1.0 / 9);
  q = fused<kHardware>(q, z, 1.0 / 7);
  q = fused<kHardware>(q, z, 1.0 / 5);
  q = fused<kHardware>(q, z, 1.0 / 3);
  return fused<kHardware>(e, kLn2, 2.0 * s * fused<kHardware>(q, z, 1.0));
}

// e^y within 1e-11 of itself, for |y| < 700.
template <bool kHardware>
DBK_INLINE double exp_of(double y) {
  const double shifted = y * (1 / kLn2) + kShift, r = y - (shifted - kShift) * kLn2;
  double q = fused<kHardware>(r, 1.0 / 362880, 1.0 / 40320);
  q = fused<kHardware>(q, r, 1.0 / 5040);
  q = fused<kHardware>(q, r, 1.0 / 720);
  q = fused<kHardware>(q, r, 1.0 / 120);
  q = fused<kHardware>(q, r, 1.0 / 24);
  q = fused<kHardware>(q, r, 1.0 / 6);
  q = fused<kHardware>(q, r, 0.5);
  q = fused<kHardware>(q, r, 1.0);
  q = fused<kHardware>(q, r, 1.0);
  return from_bits(to_bits(q) + (to_bits(shifted) << 52));
}

// x >= 0 with P(N(0, 1) > x) = p, for p in [1e-302, 1/2]: our own minimax fit in t = sqrt(-ln p), off by at most
// 1.3e-10. Times P_std that is sigma's relative error before its one rounding.
template <bool kHardware>
DBK_INLINE double upper_quantile(double p) {
  const double t = std::sqrt(-log_of<kHardware>(p));
  double n = fused<kHardware>(t, 0.033580086600995714, 2.0421168150091753);
  n = fused<kHardware>(n, t, 27.77268253803557);
  n = fused<kHardware>(n, t, 102.77359772225746);
  n = fused<kHardware>(n, t, 73.01997122565713);
  n = fused<kHardware>(n, t, -56.514609291104556);
  n = fused<kHardware>(n, t, -45.52366798008869);
  n = fused<kHardware>(n, t, -22.173741152457826);
  n = fused<kHardware>(n, t, -3.3863239657602824);
  double d = fused<kHardware>(t, 0.02374449996167523, 1.4440791864416036);
  d = fused<kHardware>(d, t, 19.71367881417226);
  d = fused<kHardware>(d, t, 75.9595822132304);
  d = fused<kHardware>(d, t, 83.6157203517707);
  d = fused<kHardware>(d, t, 37.769705129553174);
  d = fused<kHardware>(d, t, 11.73095888548876);
  d = fused<kHardware>(d, t, 1.0);
  return n / d;
}

DBK_INLINE double within(double value, double low, double high) {
  const double raised = value < low ? low : value;
  return raised > high ? high : raised;
}

// The level with the share u of the range's probability below it, counted from the nearer tail.
template <bool kHardware>
DBK_INLINE float level(double u, const Plan& plan) {
  const double lower = plan.below + u * plan.inside, upper = plan.above + (1.0 - u) * plan.inside;
  const double x = upper_quantile<kHardware>(lower < upper ? lower : upper);
  const double y = within(plan.P_mean + plan.P_std * (lower < upper ? -x : x), plan.ln_low, plan.ln_high);
  return static_cast<float>(within(exp_of<kHardware>(y), plan.low, plan.high));
}

// Blocks [begin, end) of 4·kGroups levels.
template <bool kAvx2>
DBK_INLINE void blocks(float* out, int64_t numel, const Plan& plan, uint64_t seed, uint32_t offset, int64_t begin,
                       int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint32_t x[4][kGroups];
    float n[4][kGroups], sigma[4 * kGroups];
    draw_words<kAvx2>(x, static_cast<uint64_t>(block) * kGroups, seed, offset, kUniformStream);
    for (int w = 0; w < 4; ++w) {
#pragma omp simd
      for (int g = 0; g < kGroups; ++g) n[w][g] = level<kAvx2 || kPlainFma>(uniform_of_word(x[w][g]), plan);
    }
    interleave<kAvx2>(n, sigma);
    const int64_t first = block * 4 * kGroups;
    std::copy_n(sigma, std::min<int64_t>(4 * kGroups, numel - first), out + first);
  }
}

DBK_AVX2 void blocks_avx2(float* out, int64_t numel, const Plan& plan, uint64_t seed, uint32_t offset, int64_t begin,
                          int64_t end) {
  blocks<true>(out, numel, plan, seed, offset, begin, end);
}

void blocks_portable(float* out, int64_t numel, const Plan& plan, uint64_t seed, uint32_t offset, int64_t begin,
                     int64_t end) {
  blocks<false>(out, numel, plan, seed, offset, begin, end);
}

}  // namespace

void sample_sigma_cpu(Tensor out, Tensor plan, int64_t seed, int64_t offset) {
  const double* p = static_cast<const double*>(plan.data_ptr());
  const Plan given{p[0], p[1], p[2], p[3], p[4], p[5], p[6], std::log(p[5]), std::log(p[6])};
  float* to = static_cast<float*>(out.data_ptr());
  const int64_t numel = out.numel();
  const auto body = use_avx2() ? blocks_avx2 : blocks_portable;
  torch::stable::parallel_for(0, (numel + 4 * kGroups - 1) / (4 * kGroups), kGrain, [&](int64_t begin, int64_t end) {
    body(to, numel, given, static_cast<uint64_t>(seed), static_cast<uint32_t>(offset), begin, end);
  });
}

}  // namespace dbk
