// LayerNorm and RMSNorm with modulation, alone or behind a gated residual, on the CPU. A row is read from memory once.
// Definitions: dbkernels/ada_norm.py, dbkernels/gated_residual_norm.py.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/rows.h"
#include "ops.h"

namespace dbk {
namespace {

template <typename T, typename C>
struct Forward {
  Rows<const T> x, branch;
  Rows<T> h, out;
  C *mean, *rstd;  // one per row; mean is null for RMS
  int64_t dim;
  C eps;
};

// values: scratch for one row in the arithmetic's type.
template <bool kGated, typename T, typename C>
DBK_INLINE void forward_row(const Forward<T, C>& f, const Modulation<C>& m, C* values, int64_t o, int64_t i,
                            int64_t row) {
  const T* x = f.x.at(o, i);
  if constexpr (kGated) {
    const T* branch = f.branch.at(o, i);
    T* h = f.h.at(o, i);
    const C* gate = m.g.data();
#pragma omp simd
    for (int64_t j = 0; j < f.dim; ++j) {
      store_as(h[j], load_as<C>(x[j]) + gate[j] * load_as<C>(branch[j]));
      values[j] = load_as<C>(h[j]);  // as stored: the backward pass starts from it
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < f.dim; ++j) values[j] = load_as<C>(x[j]);
  }
  const C mean = f.mean ? sum(values, f.dim) / static_cast<C>(f.dim) : C(0);
  const C rstd = C(1) / std::sqrt(squared_distance(values, mean, f.dim) / static_cast<C>(f.dim) + f.eps);
  if (f.mean) f.mean[row] = mean;
  f.rstd[row] = rstd;
  T* out = f.out.at(o, i);
  const C *k = m.k.data(), *t = m.t.data();
#pragma omp simd
  for (int64_t j = 0; j < f.dim; ++j) store_as(out[j], (values[j] - mean) * rstd * k[j] + t[j]);
}

template <typename T, typename C>
struct Backward {
  Rows<const T> grad, grad_h, x, branch;  // x is h behind a gated residual; grad_h may be null
  Rows<T> dx, dbranch;
  const C *mean, *rstd;
  int64_t dim;
};

// Sums over rows: of the output's gradient, of it times the normalised row, of the residual's gradient times the branch.
// They lie `apart` from each other.
template <typename C>
struct Sums {
  C* first;
  int64_t apart;
};

// scratch: five rows.
template <bool kGated, typename T, typename C>
DBK_INLINE void backward_row(const Backward<T, C>& b, const Modulation<C>& m, const Sums<C>& sums, C* scratch, int64_t o,
                             int64_t i, int64_t row) {
  const T *grad = b.grad.at(o, i), *x = b.x.at(o, i);
  const C mean = b.mean ? b.mean[row] : C(0), rstd = b.rstd[row];
  C *normal = scratch, *scaled = scratch + b.dim, *sum_grad = sums.first, *sum_normal = sums.first + sums.apart;
  const C* k = m.k.data();
  C total = 0, along = 0;
#pragma omp simd reduction(+ : total, along)
  for (int64_t j = 0; j < b.dim; ++j) {
    const C g = load_as<C>(grad[j]);
    normal[j] = (load_as<C>(x[j]) - mean) * rstd;
    scaled[j] = g * k[j];
    total += scaled[j];
    along += scaled[j] * normal[j];
    sum_grad[j] += g;
    sum_normal[j] += g * normal[j];
  }
  const C level = b.mean ? total / static_cast<C>(b.dim) : C(0), slope = along / static_cast<C>(b.dim);
  T* dx = b.dx.at(o, i);
  if constexpr (kGated) {
    const T *grad_h = b.grad_h.data ? b.grad_h.at(o, i) : nullptr, *branch = b.branch.at(o, i);
    T* dbranch = b.dbranch.at(o, i);
    const C* gate = m.g.data();
    C* sum_branch = sums.first + 2 * sums.apart;
    if (grad_h) {
#pragma omp simd
      for (int64_t j = 0; j < b.dim; ++j) {
        scaled[j] = rstd * (scaled[j] - level - normal[j] * slope) + load_as<C>(grad_h[j]);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < b.dim; ++j) scaled[j] = rstd * (scaled[j] - level - normal[j] * slope);
    }
#pragma omp simd
    for (int64_t j = 0; j < b.dim; ++j) {
      store_as(dx[j], scaled[j]);
      store_as(dbranch[j], gate[j] * scaled[j]);
      sum_branch[j] += scaled[j] * load_as<C>(branch[j]);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < b.dim; ++j) store_as(dx[j], rstd * (scaled[j] - level - normal[j] * slope));
  }
}

// A tile of rows. Sums are taken over a few rows first, then over those: float32 loses less than row by row.
template <bool kGated, typename T, typename C>
DBK_INLINE void backward_tile(const Backward<T, C>& b, const Modulation<C>& m, const Sums<C>& sums, C* scratch,
                              int64_t o, int64_t begin, int64_t end, int64_t inner) {
  constexpr int64_t kFew = 8, kKinds = kGated ? 3 : 2;
  const Sums<C> few{scratch + 2 * b.dim, b.dim};
  for (int64_t first = begin; first < end; first += kFew) {
    std::fill_n(few.first, kKinds * b.dim, C(0));
    for (int64_t i = first; i < std::min(first + kFew, end); ++i) {
      backward_row<kGated>(b, m, few, scratch, o, i, o * inner + i);
    }
    for (int64_t kind = 0; kind < kKinds; ++kind) {
      C* to = sums.first + kind * sums.apart;
      const C* from = few.first + kind * few.apart;
#pragma omp simd
      for (int64_t j = 0; j < b.dim; ++j) to[j] += from[j];
    }
  }
}

// The same in the build chosen at run time.
template <bool kGated, typename T, typename C>
DBK_AVX2 void forward_avx2(const Forward<T, C>& f, const Modulation<C>& m, C* values, int64_t o, int64_t begin,
                           int64_t end, int64_t inner) {
  for (int64_t i = begin; i < end; ++i) forward_row<kGated>(f, m, values, o, i, o * inner + i);
}

template <bool kGated, typename T, typename C>
void forward_portable(const Forward<T, C>& f, const Modulation<C>& m, C* values, int64_t o, int64_t begin, int64_t end,
                      int64_t inner) {
  for (int64_t i = begin; i < end; ++i) forward_row<kGated>(f, m, values, o, i, o * inner + i);
}

template <bool kGated, typename T, typename C>
DBK_AVX2 void backward_avx2(const Backward<T, C>& b, const Modulation<C>& m, const Sums<C>& sums, C* scratch, int64_t o,
                            int64_t begin, int64_t end, int64_t inner) {
  backward_tile<kGated>(b, m, sums, scratch, o, begin, end, inner);
}

template <bool kGated, typename T, typename C>
void backward_portable(const Backward<T, C>& b, const Modulation<C>& m, const Sums<C>& sums, C* scratch, int64_t o,
                       int64_t begin, int64_t end, int64_t inner) {
  backward_tile<kGated>(b, m, sums, scratch, o, begin, end, inner);
}

template <typename C>
constexpr ScalarType scalar_type() {
  return sizeof(C) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
}

template <typename C>
C* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<C*>(tensor.data_ptr()) : nullptr;
}

template <typename T, typename C>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_in, const MaybeTensor& branch_in,
                                                   const MaybeTensor& gate, const MaybeTensor& shift,
                                                   const MaybeTensor& scale, const MaybeTensor& weight,
                                                   const MaybeTensor& bias, double eps, bool rms) {
  const Tensor x = with_rows(x_in), branch = with_rows(branch_in.value_or(x_in));
  const Tiling tiling(x);
  const auto type = scalar_type<C>();
  const std::vector<int64_t> shape{tiling.outer, tiling.inner, tiling.dim}, rows{tiling.outer, tiling.inner}, none{0};
  Tensor out = torch::stable::new_empty(x, shape), h = branch_in ? torch::stable::new_empty(x, shape) : out;
  Tensor mean = torch::stable::new_empty(x, rms ? none : rows, type), rstd = torch::stable::new_empty(x, rows, type);
  Forward<T, C> job{Rows<const T>(x), Rows<const T>(branch), Rows<T>(h),  Rows<T>(out),
                    data<C>(mean),    data<C>(rstd),         tiling.dim, static_cast<C>(eps)};
  const auto body = branch_in ? (use_avx2() ? forward_avx2<true, T, C> : forward_portable<true, T, C>)
                              : (use_avx2() ? forward_avx2<false, T, C> : forward_portable<false, T, C>);
  const auto make = [&] {
    return std::make_pair(Modulation<C>(tiling.dim, shift, scale, weight, bias, gate), std::vector<C>(tiling.dim));
  };
  for_tiles(tiling, make, [&](auto& own, int64_t, int64_t o, int64_t first, int64_t last) {
    own.first.load(o);
    body(job, own.first, own.second.data(), o, first, last, tiling.inner);
  });
  return {h, out, mean, rstd};
}

// Adds the tiles of each sample in their order: (tiles of all samples, kinds, D) to (kinds, O, 1, D).
template <typename C>
void add_tiles(const std::vector<C>& partial, const Tiling& tiling, int64_t kinds, C* to) {
  const int64_t dim = tiling.dim;
  std::vector<double> sums(kinds * dim);
  for (int64_t o = 0; o < tiling.outer; ++o) {
    std::fill(sums.begin(), sums.end(), 0.0);
    const C* from = partial.data() + o * tiling.per_sample * kinds * dim;
    for (int64_t tile = 0; tile < tiling.per_sample; ++tile, from += kinds * dim) {
      for (int64_t j = 0; j < kinds * dim; ++j) sums[j] += from[j];
    }
    for (int64_t kind = 0; kind < kinds; ++kind) {
      C* row = to + (kind * tiling.outer + o) * dim;
      for (int64_t j = 0; j < dim; ++j) row[j] = static_cast<C>(sums[kind * dim + j]);
    }
  }
}

template <typename T, typename C>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const MaybeTensor& grad_h_in, const Tensor& x_in,
                                            const MaybeTensor& branch_in, const MaybeTensor& gate,
                                            const MaybeTensor& scale, const MaybeTensor& weight, const Tensor& mean,
                                            const Tensor& rstd) {
  const Tensor grad = with_rows(grad_in), x = with_rows(x_in), branch = with_rows(branch_in.value_or(x_in));
  const Tensor grad_h = with_rows(grad_h_in.value_or(grad_in));
  const Tiling tiling(x);
  const std::vector<int64_t> shape{tiling.outer, tiling.inner, tiling.dim};
  Tensor dx = torch::stable::new_empty(x, shape), dbranch = branch_in ? torch::stable::new_empty(x, shape) : dx;
  Backward<T, C> job{Rows<const T>(grad), grad_h_in ? Rows<const T>(grad_h) : Rows<const T>(),
                     Rows<const T>(x),    Rows<const T>(branch),
                     Rows<T>(dx),         Rows<T>(dbranch),
                     data<C>(mean),       data<C>(rstd),
                     tiling.dim};
  const auto body = branch_in ? (use_avx2() ? backward_avx2<true, T, C> : backward_portable<true, T, C>)
                              : (use_avx2() ? backward_avx2<false, T, C> : backward_portable<false, T, C>);
  const int64_t kinds = branch_in ? 3 : 2, dim = tiling.dim;
  Tensor sums = torch::stable::new_zeros(x, {kinds, tiling.outer, 1, dim}, scalar_type<C>());
  const bool one_tile = tiling.per_sample == 1;  // per sample: its sums are the result
  std::vector<C> partial(one_tile ? 0 : tiling.count() * kinds * dim);
  const MaybeTensor none;
  const auto make = [&] {
    return std::make_pair(Modulation<C>(dim, none, scale, weight, none, gate), std::vector<C>(5 * dim));
  };
  for_tiles(tiling, make, [&](auto& own, int64_t tile, int64_t o, int64_t first, int64_t last) {
    own.first.load(o);
    const Sums<C> to = one_tile ? Sums<C>{data<C>(sums) + o * dim, tiling.outer * dim}
                                : Sums<C>{partial.data() + tile * kinds * dim, dim};
    body(job, own.first, to, own.second.data(), o, first, last, tiling.inner);
  });
  if (!one_tile) add_tiles(partial, tiling, kinds, data<C>(sums));
  return {dx, dbranch, sums};
}

template <typename Call>
auto by_type(const Tensor& x, const Call& call) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return call(float(), float());
    case ScalarType::Double: return call(double(), double());
    case ScalarType::BFloat16: return call(BFloat16(), float());
    case ScalarType::Half: return call(Half(), float());
    default: STD_TORCH_CHECK(false, "x must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ada_norm_cpu(const Tensor& x, MaybeTensor shift, MaybeTensor scale,
                                                MaybeTensor weight, MaybeTensor bias, double eps, bool rms) {
  return by_type(x, [&](auto t, auto c) -> std::tuple<Tensor, Tensor, Tensor> {
    auto [h, out, mean, rstd] = forward<decltype(t), decltype(c)>(x, {}, {}, shift, scale, weight, bias, eps, rms);
    return {out, mean, rstd};
  });
}

std::tuple<Tensor, Tensor> ada_norm_backward_cpu(const Tensor& grad, const Tensor& x, MaybeTensor scale,
                                                 MaybeTensor weight, const Tensor& mean, const Tensor& rstd) {
  return by_type(x, [&](auto t, auto c) -> std::tuple<Tensor, Tensor> {
    auto [dx, dbranch, sums] = backward<decltype(t), decltype(c)>(grad, {}, x, {}, {}, scale, weight, mean, rstd);
    return {dx, sums};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_cpu(const Tensor& x, const Tensor& branch,
                                                                   const Tensor& gate, MaybeTensor shift,
                                                                   MaybeTensor scale, MaybeTensor weight,
                                                                   MaybeTensor bias, double eps, bool rms) {
  return by_type(x, [&](auto t, auto c) {
    return forward<decltype(t), decltype(c)>(x, branch, gate, shift, scale, weight, bias, eps, rms);
  });
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm_backward_cpu(const Tensor& grad, MaybeTensor grad_h,
                                                                    const Tensor& h, const Tensor& branch,
                                                                    const Tensor& gate, MaybeTensor scale,
                                                                    MaybeTensor weight, const Tensor& mean,
                                                                    const Tensor& rstd) {
  return by_type(h, [&](auto t, auto c) {
    return backward<decltype(t), decltype(c)>(grad, grad_h, h, branch, gate, scale, weight, mean, rstd);
  });
}

}  // namespace dbk
