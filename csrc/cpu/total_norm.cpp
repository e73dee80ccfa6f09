// The 2-norm of a list of tensors together, on the CPU. Definition: dbkernels/total_norm.py.

#include <cmath>
#include <numeric>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/multi_tensor.h"
#include "cpu/simd.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
DBK_INLINE double squares(const T* x, int64_t count) {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
  // Eight running sums: the loop vectorises, and float64 keeps a billion squares exact to far below float32's last bit.
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) {
      const double value = load_as<C>(x[i + k]);
      sums[k] += value * value;
    }
  }
  for (; i < count; ++i) {
    const double value = load_as<C>(x[i]);
    sums[i % 8] += value * value;
  }
  return std::accumulate(sums, sums + 8, 0.0);
}

// Of elements [first, last) of a tensor's memory.
using Squares = double (*)(const void* data, int64_t first, int64_t last);

template <typename T>
DBK_AVX2 double squares_avx2(const void* data, int64_t first, int64_t last) {
  return squares(static_cast<const T*>(data) + first, last - first);
}

template <typename T>
double squares_portable(const void* data, int64_t first, int64_t last) {
  return squares(static_cast<const T*>(data) + first, last - first);
}

template <typename T>
Squares built() {
  return use_avx2() ? squares_avx2<T> : squares_portable<T>;
}

Squares squares_for(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return built<float>();
    case ScalarType::Double: return built<double>();
    case ScalarType::BFloat16: return built<BFloat16>();
    case ScalarType::Half: return built<Half>();
    default: STD_TORCH_CHECK(false, "total_norm: tensors must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

double norm_of(const Tensors& tensors, const Index& index) {
  std::vector<Squares> sums;
  for (const Tensor& tensor : tensors) sums.push_back(squares_for(tensor.scalar_type()));
  std::vector<double> partial(index.units());
  torch::stable::parallel_for(0, index.units(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      index.pieces(unit, [&](size_t t, int64_t first, int64_t last) {
        partial[unit] += sums[t](tensors[t].data_ptr(), first, last);
      });
    }
  });
  return std::sqrt(std::accumulate(partial.begin(), partial.end(), 0.0));
}

Tensor total_norm_cpu(Tensors tensors) {
  bool wide = false;
  for (Tensor& tensor : tensors) {
    tensor = torch::stable::contiguous(tensor);
    wide |= tensor.scalar_type() == ScalarType::Double;
  }
  const double norm = norm_of(tensors, Index(tensors));
  Tensor result = torch::stable::new_empty(tensors[0], {}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *static_cast<double*>(result.data_ptr()) = norm;
  } else {
    *static_cast<float*>(result.data_ptr()) = static_cast<float>(norm);
  }
  return result;
}

}  // namespace dbk
