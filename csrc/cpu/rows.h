// Rows of (O, I, D) tensors, and the vectors that rows of one sample share.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/simd.h"

namespace dbk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Rows whose sums make one partial sum: fixed, so that the bits of a sum don't depend on the number of threads.
constexpr int64_t kTile = 64;
constexpr int64_t kGrain = 1 << 14;  // elements a thread takes at least: some 10 us of work

// A tensor with rows of adjacent elements; any other strides.
inline Tensor with_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.strides()[last] == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t outer = 0, inner = 0;

  Rows() = default;
  explicit Rows(const Tensor& t) : data(static_cast<T*>(t.data_ptr())), outer(t.strides()[0]), inner(t.strides()[1]) {}
  T* at(int64_t o, int64_t i) const { return data + o * outer + i * inner; }
};

// Work of one thread at a time: up to kTile rows of one sample.
struct Tiling {
  int64_t outer, inner, dim, per_sample;

  explicit Tiling(const Tensor& x)
      : outer(x.size(0)), inner(x.size(1)), dim(x.size(2)), per_sample((inner + kTile - 1) / kTile) {}
  int64_t count() const { return outer * per_sample; }
  int64_t grain() const {
    const int64_t rows = inner < kTile ? inner : kTile;
    return 1 + kGrain / (1 + rows * dim);
  }
};

template <typename T, typename C>
DBK_INLINE void load_row(const T* from, int64_t count, C* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = load_as<C>(from[j]);
}

template <typename C>
DBK_INLINE C sum(const C* values, int64_t count) {
  C total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) total += values[j];
  return total;
}

template <typename C>
DBK_INLINE C squared_distance(const C* values, C from, int64_t count) {
  C total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) total += (values[j] - from) * (values[j] - from);
  return total;
}

// Sample o of a (O, 1, D) tensor, or a (D,) one, of any floating type; `missing` where there is none.
template <typename C>
void read_vector(const MaybeTensor& tensor, int64_t o, std::vector<C>& to, C missing) {
  if (!tensor) return to.assign(to.size(), missing);
  const int64_t last = tensor->dim() - 1, step = tensor->strides()[last];
  const int64_t first = last == 0 ? 0 : o * tensor->strides()[0];
  const auto copy = [&](auto* data) {
    for (size_t j = 0; j < to.size(); ++j) to[j] = load_as<C>(data[first + static_cast<int64_t>(j) * step]);
  };
  switch (tensor->scalar_type()) {
    case ScalarType::Float: return copy(static_cast<const float*>(tensor->data_ptr()));
    case ScalarType::Double: return copy(static_cast<const double*>(tensor->data_ptr()));
    case ScalarType::BFloat16: return copy(static_cast<const BFloat16*>(tensor->data_ptr()));
    case ScalarType::Half: return copy(static_cast<const Half*>(tensor->data_ptr()));
    default: STD_TORCH_CHECK(false, "shift, scale, gate, weight and bias must be floating point");
  }
}

// The affine map after the normalisation, n -> n·k + t, and the gate before it, for one sample.
template <typename C>
struct Modulation {
  const MaybeTensor &shift, &scale, &weight, &bias, &gate;
  std::vector<C> k, t, g;

  Modulation(int64_t dim, const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& weight,
             const MaybeTensor& bias, const MaybeTensor& gate)
      : shift(shift), scale(scale), weight(weight), bias(bias), gate(gate), k(dim), t(dim), g(gate ? dim : 0) {}

  void load(int64_t o) {
    if (o == loaded_) return;
    loaded_ = o;
    std::vector<C> other(k.size());
    read_vector(scale, o, k, C(0));
    read_vector(bias, 0, t, C(0));
    for (size_t j = 0; j < k.size(); ++j) k[j] += C(1), t[j] *= k[j];
    read_vector(weight, 0, other, C(1));
    for (size_t j = 0; j < k.size(); ++j) k[j] *= other[j];
    read_vector(shift, o, other, C(0));
    for (size_t j = 0; j < k.size(); ++j) t[j] += other[j];
    if (gate) read_vector(gate, o, g, C(0));
  }

 private:
  int64_t loaded_ = -1;
};

}  // namespace dbk
