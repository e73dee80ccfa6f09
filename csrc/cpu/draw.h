// Random words of a run of groups, word by word, and their conversion to element order. Parts that GCC doesn't vectorise
// well are written in AVX2: the block cipher on 64-bit lanes and the 4 x 8 transpose.
#pragma once

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace dbk {

#if defined(__x86_64__) && defined(__GNUC__)
// Words of groups first .. first + 3, each in the low half of a 64-bit lane. vpmuludq reads only the low halves, so the
// upper halves need no clearing between rounds: 8 instructions per round for 16 numbers.
DBK_AVX2 inline void words_of_four(uint64_t first, uint64_t seed, uint32_t offset, uint32_t stream, __m128i out[4]) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i x0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 1, 2, 3));
  __m256i x1 = _mm256_srli_epi64(x0, 32);
  __m256i x2 = _mm256_set1_epi64x(offset), x3 = _mm256_set1_epi64x(stream);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(x0, m0), p1 = _mm256_mul_epu32(x2, m1);
    x0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), x1), _mm256_set1_epi64x(k0));
    x2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), x3), _mm256_set1_epi64x(k1));
    x1 = p1;
    x3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const __m256i words[4] = {x0, x1, x2, x3};
  for (int w = 0; w < 4; ++w) {
    out[w] = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(words[w], low_halves));
  }
}

// to[4·lane + word] = n[word][lane] for 8 lanes.
DBK_AVX2 inline void store_interleaved(const float* n0, const float* n1, const float* n2, const float* n3, float* to) {
  const __m256 a = _mm256_loadu_ps(n0), b = _mm256_loadu_ps(n1), c = _mm256_loadu_ps(n2), d = _mm256_loadu_ps(n3);
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  const __m256 r0 = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));    // lanes 0 and 4
  const __m256 r1 = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));    // 1 and 5
  const __m256 r2 = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));  // 2 and 6
  const __m256 r3 = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));  // 3 and 7
  _mm256_storeu_ps(to, _mm256_permute2f128_ps(r0, r1, 0x20));
  _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(r2, r3, 0x20));
  _mm256_storeu_ps(to + 16, _mm256_permute2f128_ps(r0, r1, 0x31));
  _mm256_storeu_ps(to + 24, _mm256_permute2f128_ps(r2, r3, 0x31));
}

template <int kGroups>
DBK_AVX2 inline void words_avx2(uint32_t (&x)[4][kGroups], uint64_t first, uint64_t seed, uint32_t offset,
                                uint32_t stream) {
  for (int g = 0; g < kGroups; g += 4) {
    __m128i words[4];
    words_of_four(first + g, seed, offset, stream, words);
    for (int w = 0; w < 4; ++w) _mm_storeu_si128(reinterpret_cast<__m128i*>(&x[w][g]), words[w]);
  }
}
#endif

// x[w][g]: word w of group first + g. kGroups: a multiple of 8.
template <bool kAvx2, int kGroups>
DBK_INLINE void draw_words(uint32_t (&x)[4][kGroups], uint64_t first, uint64_t seed, uint32_t offset, uint32_t stream) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kAvx2) return words_avx2(x, first, seed, offset, stream);
#endif
#pragma omp simd
  for (int g = 0; g < kGroups; ++g) {
    const Words w = words_of_group(first + g, seed, offset, stream);
    x[0][g] = w.x0;
    x[1][g] = w.x1;
    x[2][g] = w.x2;
    x[3][g] = w.x3;
  }
}

// to[4·g + w] = n[w][g], for any numbers of 32 bits.
template <bool kAvx2, int kGroups, typename N>
DBK_INLINE void interleave(const N (&n)[4][kGroups], N* to) {
  static_assert(sizeof(N) == sizeof(float));
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kAvx2) {
    const auto lanes = [&](int w, int g) { return reinterpret_cast<const float*>(&n[w][g]); };
    for (int g = 0; g < kGroups; g += 8) {
      store_interleaved(lanes(0, g), lanes(1, g), lanes(2, g), lanes(3, g), reinterpret_cast<float*>(to + 4 * g));
    }
    return;
  }
#endif
  for (int g = 0; g < kGroups; ++g) {
    for (int w = 0; w < 4; ++w) to[4 * g + w] = n[w][g];
  }
}

// The normals of kGroups groups, in element order.
template <bool kAvx2, int kGroups>
DBK_INLINE void draw_normals(float* eps, uint64_t first, uint64_t seed, uint32_t offset) {
  constexpr bool kHardware = kAvx2 || kPlainFma;
  uint32_t x[4][kGroups];
  float n[4][kGroups];
  draw_words<kAvx2>(x, first, seed, offset, kNormalStream);
#pragma omp simd
  for (int g = 0; g < kGroups; ++g) {
    box_muller<kHardware>(x[0][g], x[1][g], n[0][g], n[1][g]);
    box_muller<kHardware>(x[2][g], x[3][g], n[2][g], n[3][g]);
  }
  interleave<kAvx2>(n, eps);
}

}  // namespace dbk
