// Uniforms by address on the CPU. Definition: dbkernels/philox.py.

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "cpu/draw.h"
#include "ops.h"

namespace dbk {
namespace {

constexpr int kGroups = 16, kBlock = 4 * kGroups;  // groups of four uniforms drawn together; elements per block
constexpr int64_t kGrain = 256;                    // least blocks per thread: some 20 us of work

template <bool kAvx2>
DBK_INLINE void blocks(float* out, int64_t numel, uint64_t seed, uint32_t offset, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint32_t x[4][kGroups];
    float n[4][kGroups], u[kBlock];
    draw_words<kAvx2>(x, static_cast<uint64_t>(block) * kGroups, seed, offset, kUniformStream);
    for (int w = 0; w < 4; ++w) {
#pragma omp simd
      for (int g = 0; g < kGroups; ++g) n[w][g] = uniform_of_word(x[w][g]);
    }
    interleave<kAvx2>(n, u);
    std::copy_n(u, std::min<int64_t>(kBlock, numel - block * kBlock), out + block * kBlock);
  }
}

DBK_AVX2 void blocks_avx2(float* out, int64_t numel, uint64_t seed, uint32_t offset, int64_t begin, int64_t end) {
  blocks<true>(out, numel, seed, offset, begin, end);
}

void blocks_portable(float* out, int64_t numel, uint64_t seed, uint32_t offset, int64_t begin, int64_t end) {
  blocks<false>(out, numel, seed, offset, begin, end);
}

}  // namespace

void philox_uniform_cpu(Tensor out, int64_t seed, int64_t offset) {
  float* to = static_cast<float*>(out.data_ptr());
  const int64_t numel = out.numel();
  const auto body = use_avx2() ? blocks_avx2 : blocks_portable;
  torch::stable::parallel_for(0, (numel + kBlock - 1) / kBlock, kGrain, [&](int64_t begin, int64_t end) {
    body(to, numel, static_cast<uint64_t>(seed), static_cast<uint32_t>(offset), begin, end);
  });
}

}  // namespace dbk
