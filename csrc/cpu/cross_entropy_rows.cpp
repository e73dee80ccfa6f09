// Losses of rows of logits, and their gradient in the logits' place, on the CPU. Definition: dbkernels/cross_entropy_rows.py.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "cpu/rows.h"
#include "ops.h"

namespace dbk {
namespace {

constexpr int64_t kBlock = 1024;  // columns whose sum is taken in the logits' type; blocks add up in float64

// exp(x) for x <= 0, to a unit or two in the last place; 0 below the normal numbers. NaN stays. Cephes' polynomial.
template <bool kHardware>
DBK_INLINE float exp_negative(float x) {
  const float shifted = fma32<kHardware>(x, 1.44269504f, 12582912.0f);  // its low bits hold the power of two
  const float n = shifted - 12582912.0f;
  const float r = fma32<kHardware>(n, 2.12194440e-4f, fma32<kHardware>(n, -0.693359375f, x));
  float p = fma32<kHardware>(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fma32<kHardware>(p, r, 8.3334519073e-3f);
  p = fma32<kHardware>(p, r, 4.1665795894e-2f);
  p = fma32<kHardware>(p, r, 1.6666665459e-1f);
  p = fma32<kHardware>(p, r, 5.0000001201e-1f);
  const float mantissa = fma32<kHardware>(p * r, r, r) + 1.0f;
  const float value = mantissa * bits_to_float((float_to_bits(shifted) + 127u - 0x4B400000u) << 23);
  return x < -87.3f ? 0.0f : value;
}

template <bool kHardware>
DBK_INLINE double exp_negative(double x) {
  return std::exp(x);
}

template <bool kHardware, typename C>
DBK_INLINE double exponentials(C* row, int64_t count, C top) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    C* block = row + first;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) block[j] = exp_negative<kHardware>(block[j] - top);
    total += sum(block, size);
  }
  return total;
}

// The loss of one row. The sum leaves out the target, so that 1 - p keeps its digits. -1 is ignored; other
// values that are no column give NaN: a check of the values may have been left out.
template <bool kHardware, typename C>
DBK_INLINE C loss_of(C* row, int64_t count, int64_t target, const C* factor) {
  if (target < -1 || target >= count) {
    const C nan = std::numeric_limits<C>::quiet_NaN();
    if (factor != nullptr) std::fill(row, row + count, nan);
    return nan;
  }
  C top = row[0];
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < count; ++j) top = row[j] > top ? row[j] : top;
  const int64_t index = std::max<int64_t>(target, 0);
  const double at = static_cast<double>(row[index]) - static_cast<double>(top);
  row[index] = -std::numeric_limits<C>::infinity();
  const double rest = exponentials<kHardware>(row, count, top);
  if (factor != nullptr) {
    const C share = target < 0 ? C(0) : static_cast<C>(*factor / (rest + std::exp(at)));
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) row[j] *= share;
    row[index] = static_cast<C>(-share * rest);
  }
  return target < 0 ? C(0) : static_cast<C>(std::log1p(rest + std::expm1(at)) - at);
}

template <typename C>
struct Job {
  C* logits;
  const int64_t* target;
  const C* factor;  // or null
  C* loss;
  int64_t width, stride;
};

template <bool kHardware, typename C>
DBK_INLINE void rows(const Job<C>& job, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const C* factor = job.factor == nullptr ? nullptr : job.factor + r;
    job.loss[r] = loss_of<kHardware>(job.logits + r * job.stride, job.width, job.target[r], factor);
  }
}

template <typename C>
DBK_AVX2 void rows_avx2(const Job<C>& job, int64_t begin, int64_t end) {
  rows<true>(job, begin, end);
}

template <typename C>
void rows_portable(const Job<C>& job, int64_t begin, int64_t end) {
  rows<kPlainFma>(job, begin, end);
}

template <typename C>
void run(const Tensor& logits, const Tensor& target, const MaybeTensor& factor, Tensor& loss) {
  const Job<C> job{static_cast<C*>(logits.data_ptr()), static_cast<const int64_t*>(target.data_ptr()),
                   factor ? static_cast<const C*>(factor->data_ptr()) : nullptr, static_cast<C*>(loss.data_ptr()),
                   logits.size(1), logits.strides()[0]};
  const auto body = use_avx2() ? rows_avx2<C> : rows_portable<C>;
  torch::stable::parallel_for(0, logits.size(0), 1 + kGrain / (1 + logits.size(1)),
                              [&](int64_t begin, int64_t end) { body(job, begin, end); });
}

}  // namespace

Tensor cross_entropy_rows_cpu(Tensor logits, const Tensor& target_in, MaybeTensor factor, MaybeTensor out) {
  STD_TORCH_CHECK(logits.size(1) > 0 && logits.strides()[1] == 1, "cross_entropy_rows: logits must be rows, not empty");
  const Tensor target = torch::stable::contiguous(target_in);
  if (factor) factor = torch::stable::contiguous(*factor);
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)});
  switch (logits.scalar_type()) {
    case ScalarType::Float: run<float>(logits, target, factor, loss); break;
    case ScalarType::Double: run<double>(logits, target, factor, loss); break;
    default: STD_TORCH_CHECK(false, "cross_entropy_rows: logits must be float32 or float64");
  }
  if (factor && out) torch::stable::copy_(*out, logits);
  return loss;
}

}  // namespace dbk
