// z = c_in·(y + sigma·eps) on the CPU. Definition: dbkernels/inject_noise.py.

#include <algorithm>
#include <cmath>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/draw.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kGroups = 16;             // groups of four normals drawn together: two vectors of AVX2
constexpr int kBlock = 4 * kGroups;     // elements of a block
constexpr int64_t kGrain = 64;          // blocks a thread takes at least: some 20 us of work

template <typename T, typename C>
struct Args {
  const T* y;
  const C* sigma;
  T* z;
  int64_t numel, inner;  // inner: consecutive elements that share a noise level
  bool scaled;
  double sigma_data;
  uint64_t seed;
  uint32_t offset;
};

// One run of elements under one noise level.
template <bool kHardware, typename T, typename C>
DBK_INLINE void apply(const T* y, const float* eps, T* z, int64_t count, C sigma, C scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    C value;
    if constexpr (sizeof(C) == sizeof(float)) {
      value = fma32<kHardware>(sigma, eps[i], load_as<C>(y[i]));
    } else {
      value = y[i] + sigma * static_cast<C>(eps[i]);
    }
    store_as(z[i], value * scale);
  }
}

template <bool kAvx2, typename T, typename C>
DBK_INLINE void blocks(const Args<T, C>& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float eps[kBlock];
    draw_normals<kAvx2, kGroups>(eps, static_cast<uint64_t>(block) * kGroups, a.seed, a.offset);
    const int64_t first = block * kBlock, last = std::min(first + kBlock, a.numel);
    for (int64_t at = first; at < last;) {
      const int64_t row = at / a.inner, stop = std::min(last, (row + 1) * a.inner);
      const C sigma = a.sigma[row], data = static_cast<C>(a.sigma_data);
      const C scale = a.scaled ? C(1) / std::sqrt(sigma * sigma + data * data) : C(1);
      apply<kAvx2 || kPlainFma>(a.y + at, eps + (at - first), a.z + at, stop - at, sigma, scale);
      at = stop;
    }
  }
}

template <typename T, typename C>
DBK_AVX2 void blocks_avx2(const Args<T, C>& a, int64_t begin, int64_t end) {
  blocks<true>(a, begin, end);
}

template <typename T, typename C>
void blocks_portable(const Args<T, C>& a, int64_t begin, int64_t end) {
  blocks<false>(a, begin, end);
}

template <typename T, typename C>
void run(const Tensor& y, const Tensor& sigma, Tensor& z, std::optional<double> sigma_data, int64_t seed,
         int64_t offset) {
  const Args<T, C> args{static_cast<const T*>(y.data_ptr()),
                        static_cast<const C*>(sigma.data_ptr()),
                        static_cast<T*>(z.data_ptr()),
                        y.numel(),
                        std::max<int64_t>(1, y.numel() / std::max<int64_t>(1, sigma.numel())),
                        sigma_data.has_value(),
                        sigma_data.value_or(0.0),
                        static_cast<uint64_t>(seed),
                        static_cast<uint32_t>(offset)};
  const auto body = use_avx2() ? blocks_avx2<T, C> : blocks_portable<T, C>;
  torch::stable::parallel_for(0, (args.numel + kBlock - 1) / kBlock, kGrain,
                              [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

Tensor inject_noise_cpu(const Tensor& y_in, const Tensor& sigma_in, std::optional<double> sigma_data, int64_t seed,
                        int64_t offset) {
  const Tensor y = torch::stable::contiguous(y_in), sigma = torch::stable::contiguous(sigma_in);
  Tensor z = torch::stable::new_empty(y, y.sizes());
  switch (y.scalar_type()) {
    case ScalarType::Float: run<float, float>(y, sigma, z, sigma_data, seed, offset); break;
    case ScalarType::Double: run<double, double>(y, sigma, z, sigma_data, seed, offset); break;
    case ScalarType::BFloat16: run<BFloat16, float>(y, sigma, z, sigma_data, seed, offset); break;
    case ScalarType::Half: run<Half, float>(y, sigma, z, sigma_data, seed, offset); break;
    default: STD_TORCH_CHECK(false, "inject_noise: y must be float16, bfloat16, float32 or float64");
  }
  return z;
}

}  // namespace dbk
