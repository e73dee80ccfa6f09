// Standard normals by address, a block at a time.
#pragma once

#include "cpu/draw_avx2.h"
#include "cpu/simd.h"

namespace dbk {

constexpr int kGroups = 16;          // groups of four normals drawn together: two vectors of AVX2
constexpr int kBlock = 4 * kGroups;  // elements of a block

// The kBlock normals from element 4·first_group on.
template <bool kAvx2>
DBK_INLINE void draw(float* eps, uint64_t first_group, uint64_t seed, uint32_t offset) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kAvx2) return draw_avx2<kGroups>(eps, first_group, seed, offset);
#endif
  float n[4][kGroups];
#pragma omp simd
  for (int lane = 0; lane < kGroups; ++lane) {
    normals_of_group<kPlainFma>(first_group + lane, seed, offset, n[0][lane], n[1][lane], n[2][lane], n[3][lane]);
  }
  for (int lane = 0; lane < kGroups; ++lane) {
    for (int word = 0; word < 4; ++word) eps[4 * lane + word] = n[word][lane];
  }
}

}  // namespace dbk
