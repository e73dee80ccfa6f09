// z = c_in·(y + sigma·eps) on the CPU. Definition: dbkernels/inject_noise.py.

#include "cpu/inject_noise.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

template <typename T, typename C>
struct Dense {
  const T* y;
  int64_t numel;

  DBK_INLINE Run<T, C> operator()(int64_t at) const { return {y + at, C(1), numel}; }
};

template <typename T, typename C>
DBK_AVX2 void blocks_avx2(const Noising<T, C>& a, Dense<T, C> y, int64_t begin, int64_t end) {
  noise_blocks<true>(a, y, begin, end);
}

template <typename T, typename C>
void blocks_portable(const Noising<T, C>& a, Dense<T, C> y, int64_t begin, int64_t end) {
  noise_blocks<false>(a, y, begin, end);
}

template <typename T, typename C>
void run(const Tensor& y, const Tensor& sigma, Tensor& z, std::optional<double> sigma_data, int64_t seed,
         int64_t offset) {
  const Noising<T, C> args = noising<T, C>(sigma, z, sigma_data, seed, offset);
  const Dense<T, C> dense{static_cast<const T*>(y.data_ptr()), args.numel};
  const auto body = use_avx2() ? blocks_avx2<T, C> : blocks_portable<T, C>;
  torch::stable::parallel_for(0, (args.numel + kNoiseBlock - 1) / kNoiseBlock, kNoiseGrain,
                              [&](int64_t begin, int64_t end) { body(args, dense, begin, end); });
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
