// x *= by in place, a factor for each equal run of elements, on the CPU: what edm_loss does with an upstream gradient.
// Definition: dbkernels/edm_loss.py.

#include <algorithm>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/simd.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements a thread takes at least: some 10 us of work

// One run of rows of `per_row` elements, each times its factor.
template <typename T, typename C>
DBK_INLINE void scale_rows(T* x, const C* by, int64_t per_row, int64_t first, int64_t last) {
  if (per_row == 1) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) store_as(x[i], load_as<C>(x[i]) * by[i]);
    return;
  }
  while (first < last) {
    const int64_t row = first / per_row, stop = std::min(last, (row + 1) * per_row);
    if (by[row] != C(1)) {
#pragma omp simd
      for (int64_t i = first; i < stop; ++i) store_as(x[i], load_as<C>(x[i]) * by[row]);
    }
    first = stop;
  }
}

template <typename T, typename C>
DBK_AVX2 void scale_rows_avx2(T* x, const C* by, int64_t per_row, int64_t first, int64_t last) {
  scale_rows(x, by, per_row, first, last);
}

template <typename T, typename C>
void scale_rows_portable(T* x, const C* by, int64_t per_row, int64_t first, int64_t last) {
  scale_rows(x, by, per_row, first, last);
}

template <typename T, typename C>
void scale(Tensor& x, const Tensor& by) {
  T* data = static_cast<T*>(x.data_ptr());
  const C* factors = static_cast<const C*>(by.data_ptr());
  if (by.numel() == 1 && *factors == C(1)) return;
  const auto body = use_avx2() ? scale_rows_avx2<T, C> : scale_rows_portable<T, C>;
  const int64_t per_row = x.numel() / std::max<int64_t>(1, by.numel());
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    body(data, factors, per_row, begin, end);
  });
}

}  // namespace

void edm_loss_scale_cpu(Tensor x, const Tensor& by_in) {
  const Tensor by = torch::stable::contiguous(by_in);
  const bool wide = by.scalar_type() == ScalarType::Double;
  switch (x.scalar_type()) {
    case ScalarType::Float: return wide ? scale<float, double>(x, by) : scale<float, float>(x, by);
    case ScalarType::BFloat16: return wide ? scale<BFloat16, double>(x, by) : scale<BFloat16, float>(x, by);
    case ScalarType::Double: return scale<double, double>(x, by);
    default: STD_TORCH_CHECK(false, "edm_loss_scale_: x must be bfloat16, float32 or float64");
  }
}

}  // namespace dbk
