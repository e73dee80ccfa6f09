// Rows of (O, I, D) tensors, and the vectors shared by the rows of one sample.
#pragma once

#include <algorithm>
#include <cstring>
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
constexpr int64_t kGrain = 1 << 14;  // least elements per thread: some 10 us of work

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

// Calls body(tile number, sample, first row, last row) for all tiles, each thread with its own `make()`.
template <typename Make, typename Body>
void for_tiles(const Tiling& tiling, const Make& make, const Body& body) {
  torch::stable::parallel_for(0, tiling.count(), tiling.grain(), [&](int64_t begin, int64_t end) {
    auto own = make();
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t o = tile / tiling.per_sample, first = tile % tiling.per_sample * kTile;
      body(own, tile, o, first, std::min(first + kTile, tiling.inner));
    }
  });
}

// Four vectors of running sums: with one, each addition would wait for the one before it.
template <typename C, typename Term>
DBK_INLINE C sum_of(const C* values, int64_t count, const Term& term) {
  typedef C Lanes __attribute__((vector_size(32)));
  constexpr int64_t kLanes = 32 / sizeof(C);
  const auto lanes_at = [&](int64_t j) {
    Lanes lanes;
    std::memcpy(&lanes, values + j, sizeof lanes);
    return lanes;
  };
  Lanes sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) sums[k] += term(lanes_at(j + k * kLanes));
  }
  for (; j + kLanes <= count; j += kLanes) sums[0] += term(lanes_at(j));
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  C total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[0][lane];
  for (; j < count; ++j) total += term(values[j]);
  return total;
}

template <typename C>
DBK_INLINE C sum(const C* values, int64_t count) {
  return sum_of(values, count, [](auto value) { return value; });
}

template <typename C>
DBK_INLINE C squared_distance(const C* values, C from, int64_t count) {
  return sum_of(values, count, [from](auto value) { return (value - from) * (value - from); });
}

// A (O, 1, D) tensor or a (D,) one, of any floating type, or none.
class Vectors {
 public:
  explicit Vectors(const MaybeTensor& tensor) {
    if (!tensor) return;
    const int64_t last = tensor->dim() - 1;
    data_ = tensor->data_ptr(), type_ = tensor->scalar_type();
    step_ = tensor->strides()[last], outer_ = last == 0 ? 0 : tensor->strides()[0];
  }

  // to[j] = combine(to[j], sample o's [j]); nothing where there is no tensor.
  template <typename C, typename Combine>
  DBK_INLINE void fold(int64_t o, std::vector<C>& to, const Combine& combine) const {
    if (data_ == nullptr) return;
    switch (type_) {
      case ScalarType::Float: return fold_as<float>(o, to.data(), to.size(), combine);
      case ScalarType::Double: return fold_as<double>(o, to.data(), to.size(), combine);
      case ScalarType::BFloat16: return fold_as<BFloat16>(o, to.data(), to.size(), combine);
      case ScalarType::Half: return fold_as<Half>(o, to.data(), to.size(), combine);
      default: STD_TORCH_CHECK(false, "shift, scale, gate, weight and bias must be floating point");
    }
  }

 private:
  template <typename S, typename C, typename Combine>
  DBK_INLINE void fold_as(int64_t o, C* to, int64_t count, const Combine& combine) const {
    const S* from = static_cast<const S*>(data_) + o * outer_;
    if (step_ == 1) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) to[j] = combine(to[j], load_as<C>(from[j]));
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = combine(to[j], load_as<C>(from[j * step_]));
    }
  }

  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  int64_t outer_ = 0, step_ = 0;
};

// The affine map after the normalisation, n -> n·k + t, and the gate before it, for one sample.
template <typename C>
struct Modulation {
  std::vector<C> k, t, g;

  Modulation(int64_t dim, const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& weight,
             const MaybeTensor& bias, const MaybeTensor& gate)
      : k(dim), t(dim), g(gate ? dim : 0), shift_(shift), scale_(scale), weight_(weight), bias_(bias), gate_(gate) {}

  void load(int64_t o) {
    if (o == loaded_) return;
    loaded_ = o;
    use_avx2() ? load_avx2(o) : load_in_this_build(o);
  }

 private:
  DBK_AVX2 void load_avx2(int64_t o) { load_in_this_build(o); }

  DBK_INLINE void load_in_this_build(int64_t o) {
    const auto add = [](C a, C b) { return a + b; };
    const auto multiply = [](C a, C b) { return a * b; };
    std::fill(k.begin(), k.end(), C(1));
    std::fill(t.begin(), t.end(), C(0));
    scale_.fold(o, k, add);
    bias_.fold(0, t, add);
    for (size_t j = 0; j < k.size(); ++j) t[j] *= k[j];
    weight_.fold(0, k, multiply);
    shift_.fold(o, t, add);
    gate_.fold(o, g, [](C, C gate) { return gate; });
  }

  Vectors shift_, scale_, weight_, bias_, gate_;
  int64_t loaded_ = -1;
};

}  // namespace dbk
