// z = c_in·(y + sigma·eps) over blocks of elements, for any y that comes in runs of consecutive elements.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/draw.h"
#include "cpu/simd.h"

namespace dbk {

constexpr int kNoiseGroups = 16;               // groups of four normals drawn together: two vectors of AVX2
constexpr int kNoiseBlock = 4 * kNoiseGroups;  // elements per block
constexpr int64_t kNoiseGrain = 64;            // least blocks per thread: some 20 us of work

// The noise levels, and the output z. inner: consecutive elements per level.
template <typename T, typename C>
struct Noising {
  const C* sigma;
  T* z;
  int64_t numel, inner;
  bool scaled;
  double sigma_data;
  uint64_t seed;
  uint32_t offset;
};

template <typename T, typename C>
Noising<T, C> noising(const torch::stable::Tensor& sigma, torch::stable::Tensor& z, std::optional<double> sigma_data,
                      int64_t seed, int64_t offset) {
  return {static_cast<const C*>(sigma.data_ptr()),
          static_cast<T*>(z.data_ptr()),
          z.numel(),
          std::max<int64_t>(1, z.numel() / std::max<int64_t>(1, sigma.numel())),
          sigma_data.has_value(),
          sigma_data.value_or(0.0),
          static_cast<uint64_t>(seed),
          static_cast<uint32_t>(offset)};
}

// y from some element on: factor·from[0], factor·from[1], ... up to element `stop` of z.
template <typename T, typename C>
struct Run {
  const T* from;
  C factor;
  int64_t stop;
};

template <typename C>
DBK_INLINE C c_in(C sigma, double sigma_data) {
  const C data = static_cast<C>(sigma_data);
  return C(1) / std::sqrt(sigma * sigma + data * data);
}

// One run of elements under one noise level.
template <bool kHardware, typename T, typename C>
DBK_INLINE void noise_run(const T* y, C factor, const float* eps, T* z, int64_t count, C sigma, C scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const C clean = load_as<C>(y[i]) * factor;
    C value;
    if constexpr (sizeof(C) == sizeof(float)) {
      value = fma32<kHardware>(sigma, eps[i], clean);
    } else {
      value = clean + sigma * static_cast<C>(eps[i]);
    }
    store_as(z[i], value * scale);
  }
}

// Blocks [begin, end). rows(at): the run of y that starts at element `at`.
template <bool kAvx2, typename T, typename C, typename Rows>
DBK_INLINE void noise_blocks(const Noising<T, C>& a, Rows& rows, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float eps[kNoiseBlock];
    draw_normals<kAvx2, kNoiseGroups>(eps, static_cast<uint64_t>(block) * kNoiseGroups, a.seed, a.offset);
    const int64_t first = block * kNoiseBlock, last = std::min(first + kNoiseBlock, a.numel);
    for (int64_t at = first; at < last;) {
      const Run<T, C> run = rows(at);
      const int64_t level = at / a.inner, stop = std::min({last, run.stop, (level + 1) * a.inner});
      const C sigma = a.sigma[level], scale = a.scaled ? c_in(sigma, a.sigma_data) : C(1);
      noise_run<kAvx2 || kPlainFma>(run.from, run.factor, eps + (at - first), a.z + at, stop - at, sigma, scale);
      at = stop;
    }
  }
}

}  // namespace dbk
