// inject_noise with y as rows of a table, and the table's gradient, on the CPU. Definition:
// dbkernels/inject_noise_table.py.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/inject_noise.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;

constexpr double kLeastNorm = 1e-12;  // as in torch.nn.functional.normalize

template <typename C, typename T>
DBK_INLINE C row_norm(const T* row, int64_t width) {
  C squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += load_as<C>(row[i]) * load_as<C>(row[i]);
  return std::sqrt(squares);
}

template <typename T>
struct Table {
  const int64_t* indices;
  const T* rows;
  int64_t count, width;
  bool normalize;

  bool holds(int64_t index) const { return 0 <= index && index < count; }
};

// The rows as runs. Each thread computes the norm of a row once.
template <typename T, typename C>
struct Gathered {
  Table<T> table;
  int64_t row = -1;
  C factor = 1;
  const T* from = nullptr;

  DBK_INLINE Run<T, C> operator()(int64_t at) {
    if (at / table.width != row) enter(at / table.width);
    return {from + (at - row * table.width), factor, (row + 1) * table.width};
  }

  DBK_INLINE void enter(int64_t next) {
    row = next;
    const int64_t index = table.indices[row];
    from = table.rows + (table.holds(index) ? index : 0) * table.width;
    const C known = table.normalize ? C(1) / std::max(row_norm<C>(from, table.width), C(kLeastNorm)) : C(1);
    factor = table.holds(index) ? known : std::numeric_limits<C>::quiet_NaN();
  }
};

template <typename T, typename C>
DBK_AVX2 void blocks_avx2(const Noising<T, C>& a, Gathered<T, C> y, int64_t begin, int64_t end) {
  noise_blocks<true>(a, y, begin, end);
}

template <typename T, typename C>
void blocks_portable(const Noising<T, C>& a, Gathered<T, C> y, int64_t begin, int64_t end) {
  noise_blocks<false>(a, y, begin, end);
}

template <typename T>
Table<T> table_of(const Tensor& indices, const Tensor& table, bool normalize) {
  return {static_cast<const int64_t*>(indices.data_ptr()), static_cast<const T*>(table.data_ptr()), table.size(0),
          table.size(1), normalize};
}

template <typename T, typename C>
void run(const Tensor& indices, const Tensor& table, const Tensor& sigma, Tensor& z, std::optional<double> sigma_data,
         bool normalize, int64_t seed, int64_t offset) {
  const Noising<T, C> args = noising<T, C>(sigma, z, sigma_data, seed, offset);
  const Gathered<T, C> rows{table_of<T>(indices, table, normalize)};
  const auto body = use_avx2() ? blocks_avx2<T, C> : blocks_portable<T, C>;
  torch::stable::parallel_for(0, (args.numel + kNoiseBlock - 1) / kNoiseBlock, kNoiseGrain,
                              [&](int64_t begin, int64_t end) { body(args, rows, begin, end); });
}

// The positions of each index, in their order: places[first[k]] to places[first[k + 1] - 1] hold index k.
struct Places {
  std::vector<int64_t> first, places;
};

template <typename T>
Places sorted(const Table<T>& table, int64_t places) {
  Places result{std::vector<int64_t>(table.count + 2), std::vector<int64_t>(places)};
  for (int64_t p = 0; p < places; ++p) {
    if (table.holds(table.indices[p])) ++result.first[table.indices[p] + 2];
  }
  for (int64_t k = 2; k < table.count + 2; ++k) result.first[k] += result.first[k - 1];
  for (int64_t p = 0; p < places; ++p) {
    if (table.holds(table.indices[p])) result.places[result.first[table.indices[p] + 1]++] = p;
  }
  return result;
}

template <typename T, typename C>
struct Gradient {
  Table<T> table;
  const T* grad;
  const C* sigma;
  T* out;
  int64_t per_level;  // positions per noise level
  std::optional<double> sigma_data;
  Places places;
};

// Rows [begin, end) of the gradient: each is one thread's sum, in the order of the positions.
template <typename T, typename C>
DBK_INLINE void gradient_rows(const Gradient<T, C>& a, int64_t begin, int64_t end) {
  const int64_t width = a.table.width;
  std::vector<C> sums(width);
  for (int64_t k = begin; k < end; ++k) {
    std::fill(sums.begin(), sums.end(), C(0));
    C* sum = sums.data();
    for (int64_t j = a.places.first[k]; j < a.places.first[k + 1]; ++j) {
      const int64_t place = a.places.places[j];
      const T* grad = a.grad + place * width;
      const C scale = a.sigma_data ? c_in(a.sigma[place / a.per_level], *a.sigma_data) : C(1);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += scale * load_as<C>(grad[i]);
    }
    // Through the norm: (G - n (n·G)) / |row|.
    const T* row = a.table.rows + k * width;
    const C norm = a.table.normalize ? row_norm<C>(row, width) : C(1);
    const C inverse = C(1) / std::max(norm, C(kLeastNorm));
    C along = 0;
    if (a.table.normalize && !(norm <= C(kLeastNorm))) {
#pragma omp simd reduction(+ : along)
      for (int64_t i = 0; i < width; ++i) along += load_as<C>(row[i]) * inverse * sum[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      store_as(a.out[k * width + i], (sum[i] - load_as<C>(row[i]) * inverse * along) * inverse);
    }
  }
}

template <typename T, typename C>
DBK_AVX2 void gradient_avx2(const Gradient<T, C>& a, int64_t begin, int64_t end) {
  gradient_rows(a, begin, end);
}

template <typename T, typename C>
void gradient_portable(const Gradient<T, C>& a, int64_t begin, int64_t end) {
  gradient_rows(a, begin, end);
}

template <typename T, typename C>
void run_gradient(const Tensor& grad, const Tensor& indices, const Tensor& table, const Tensor& sigma, Tensor& out,
                  std::optional<double> sigma_data, bool normalize) {
  const Table<T> rows = table_of<T>(indices, table, normalize);
  const int64_t places = indices.numel();
  const Gradient<T, C> args{rows,
                            static_cast<const T*>(grad.data_ptr()),
                            static_cast<const C*>(sigma.data_ptr()),
                            static_cast<T*>(out.data_ptr()),
                            std::max<int64_t>(1, places / std::max<int64_t>(1, sigma.numel())),
                            sigma_data,
                            sorted(rows, places)};
  const auto body = use_avx2() ? gradient_avx2<T, C> : gradient_portable<T, C>;
  const int64_t per_row = rows.width * (2 + places / rows.count);
  torch::stable::parallel_for(0, rows.count, std::max<int64_t>(1, (1 << 15) / per_row),
                              [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

// Calls with the storage type and the arithmetic's.
template <typename Call>
void by_type(ScalarType type, const Call& call) {
  switch (type) {
    case ScalarType::Float: return call(float{}, float{});
    case ScalarType::Double: return call(double{}, double{});
    case ScalarType::BFloat16: return call(BFloat16{}, float{});
    case ScalarType::Half: return call(Half{}, float{});
    default: STD_TORCH_CHECK(false, "inject_noise: table must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

Tensor inject_noise_table_cpu(const Tensor& indices_in, const Tensor& table_in, const Tensor& sigma_in,
                              std::optional<double> sigma_data, bool normalize, int64_t seed, int64_t offset) {
  const Tensor indices = torch::stable::contiguous(indices_in), table = torch::stable::contiguous(table_in);
  const Tensor sigma = torch::stable::contiguous(sigma_in);
  std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(table.size(1));
  Tensor z = torch::stable::new_empty(table, shape);
  by_type(table.scalar_type(), [&](auto stored, auto wide) {
    run<decltype(stored), decltype(wide)>(indices, table, sigma, z, sigma_data, normalize, seed, offset);
  });
  return z;
}

Tensor inject_noise_table_grad_cpu(const Tensor& grad_in, const Tensor& indices_in, const Tensor& table_in,
                                   const Tensor& sigma_in, std::optional<double> sigma_data, bool normalize) {
  const Tensor grad = torch::stable::contiguous(grad_in), indices = torch::stable::contiguous(indices_in);
  const Tensor table = torch::stable::contiguous(table_in), sigma = torch::stable::contiguous(sigma_in);
  Tensor out = torch::stable::new_empty(table, table.sizes());
  by_type(table.scalar_type(), [&](auto stored, auto wide) {
    run_gradient<decltype(stored), decltype(wide)>(grad, indices, table, sigma, out, sigma_data, normalize);
  });
  return out;
}

}  // namespace dbk
