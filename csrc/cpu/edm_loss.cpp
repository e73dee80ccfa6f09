// weight·|D - y|² as |F - target|² on the CPU, with its gradients in the same pass. Definition: dbkernels/edm_loss.py.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/draw.h"
#include "cpu/inject_noise.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dbk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that stay in the first-level cache while they are worked on. Sums are taken chunk by chunk, so that their bits
// don't depend on the number of threads.
constexpr int64_t kChunk = 1024;
constexpr int64_t kGrain = 16;  // chunks a thread takes at least: some 10 us of work
constexpr int kLanes = 32;
constexpr int kGroups = 16;  // groups of four normals drawn together: two vectors of AVX2

struct Array {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;

  Array() = default;
  explicit Array(const Tensor& t) : data(t.data_ptr()), type(t.scalar_type()) {}
};

template <typename C>
struct Args {
  Array F, y, z;                    // z.data is null where z is drawn again
  bool z_scaled;                    // z is c_in·(y + sigma·eps)
  Array grad_F, grad_z, grad_y;     // at an upstream gradient of 1; data is null where it isn't wanted
  int64_t numel, per_level, per_sample;
  C sigma_data;
  uint64_t seed;
  uint32_t offset;
  const C* sigma = nullptr;
  C slope = 0;                      // of the loss by an element's residual, over that residual
  C* elementwise = nullptr;         // the loss of each element, unless sums are wanted
  double* partial = nullptr;        // sums of squares, by chunk + sample: a sample's parts lie side by side
};

// target = of_y·y - of_noise·n, where n is z - clean·y, or eps where z is drawn again: clean is 1, c_in, or 0.
template <typename C>
struct Coefficients {
  C of_y, of_noise, clean;
};

// By the angle whose tangent is sigma / sigma_data: no level overflows on the way. A NaN stays one.
template <typename C>
DBK_INLINE Coefficients<C> coefficients(const Args<C>& a, C sigma) {
  const C data = a.sigma_data, larger = std::max(sigma, data), ratio = std::min(sigma, data) / larger;
  const C root = larger * std::sqrt(C(1) + ratio * ratio), of_y = sigma / root / data;
  if (a.z.data == nullptr) return {of_y, data / root, C(0)};
  if (a.z_scaled) return {of_y, data / sigma, c_in(sigma, data)};  // inject_noise's bits, or clean·y wouldn't cancel
  return {of_y, data / root / sigma, C(1)};
}

template <typename C, typename T>
DBK_INLINE const C* widen(const T* from, int64_t count, C* room) {
  if constexpr (std::is_same_v<C, T>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) room[i] = load_as<C>(from[i]);
    return room;
  }
}

template <typename T>
DBK_INLINE T* at(const Array& array, int64_t first) {
  return static_cast<T*>(array.data) + first;
}

// Elements first .. first + count of an array in the arithmetic's type: where they are, or converted into `room`.
template <typename C>
DBK_INLINE const C* read(const Array& array, int64_t first, int64_t count, C* room) {
  switch (array.type) {
    case ScalarType::BFloat16: return widen(at<const BFloat16>(array, first), count, room);
    case ScalarType::Half: return widen(at<const Half>(array, first), count, room);
    case ScalarType::Double: return widen(at<const double>(array, first), count, room);
    default: return widen(at<const float>(array, first), count, room);
  }
}

template <typename C, typename T>
DBK_INLINE void scale_into(const C* from, C factor, T* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store_as(to[i], from[i] * factor);
}

template <typename C>
DBK_INLINE void write(const C* from, C factor, const Array& array, int64_t first, int64_t count) {
  switch (array.type) {
    case ScalarType::BFloat16: return scale_into(from, factor, at<BFloat16>(array, first), count);
    case ScalarType::Double: return scale_into(from, factor, at<double>(array, first), count);
    default: return scale_into(from, factor, at<float>(array, first), count);
  }
}

// residual = F - target; noise: z, or eps if drawn.
template <bool kHardware, typename C>
DBK_INLINE void residuals(const C* F, const C* y, const C* noise, bool drawn, Coefficients<C> c, C* out, int64_t count) {
  if (drawn) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      out[i] = fused<kHardware>(c.of_noise, noise[i], fused<kHardware>(-c.of_y, y[i], F[i]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const C n = fused<kHardware>(-c.clean, y[i], noise[i]);
      out[i] = fused<kHardware>(c.of_noise, n, fused<kHardware>(-c.of_y, y[i], F[i]));
    }
  }
}

// The same order of sums in every build, whatever the width of its vectors.
template <typename C>
DBK_INLINE double sum_of_squares(const C* values, int64_t count) {
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i] * values[i];
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <bool kAvx2, typename C>
DBK_INLINE const C* draw_chunk(const Args<C>& a, int64_t first, int64_t count, float* eps, C* room) {
  for (int64_t i = 0; i < count; i += 4 * kGroups) {
    draw_normals<kAvx2, kGroups>(eps + i, static_cast<uint64_t>(first + i) / 4, a.seed, a.offset);
  }
  return widen(eps, count, room);
}

// The gradients of z and y take a factor of their noise level; F's doesn't.
template <typename C>
DBK_INLINE void write_gradients(const Args<C>& a, const C* residual, int64_t first, int64_t last, Coefficients<C> c) {
  const C at_noise = a.slope * c.of_noise;
  const C at_y = -a.slope * (c.of_y + c.of_noise * c.clean);
  if (a.grad_z.data) write(residual, at_noise, a.grad_z, first, last - first);
  if (a.grad_y.data) write(residual, at_y, a.grad_y, first, last - first);
}

template <bool kAvx2, typename C>
DBK_INLINE void one_chunk(const Args<C>& a, int64_t index) {
  alignas(64) C room_F[kChunk], room_y[kChunk], room_noise[kChunk], residual[kChunk];
  alignas(64) float eps[kChunk];
  const int64_t first = index * kChunk, last = std::min(first + kChunk, a.numel), count = last - first;
  const bool drawn = a.z.data == nullptr;
  const C *F = read(a.F, first, count, room_F), *y = read(a.y, first, count, room_y);
  const C* noise = drawn ? draw_chunk<kAvx2>(a, first, count, eps, room_noise) : read(a.z, first, count, room_noise);

  for (int64_t from = first; from < last;) {
    const int64_t level = from / a.per_level, to = std::min(last, (level + 1) * a.per_level), i = from - first;
    const Coefficients<C> c = coefficients(a, a.sigma[level]);
    residuals<kAvx2 || kPlainFma>(F + i, y + i, noise + i, drawn, c, residual + i, to - from);
    write_gradients(a, residual + i, from, to, c);
    from = to;
  }
  if (a.grad_F.data) write(residual, a.slope, a.grad_F, first, count);
  if (a.elementwise) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) a.elementwise[first + i] = residual[i] * residual[i];
    return;
  }
  for (int64_t from = first; from < last;) {
    const int64_t sample = from / a.per_sample, to = std::min(last, (sample + 1) * a.per_sample);
    a.partial[index + sample] = sum_of_squares(residual + (from - first), to - from);
    from = to;
  }
}

template <typename C>
DBK_AVX2 void chunks_avx2(const Args<C>& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) one_chunk<true>(a, index);
}

template <typename C>
void chunks_portable(const Args<C>& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) one_chunk<false>(a, index);
}

template <typename C>
void finish(const Args<C>& a, int64_t samples, bool mean, C* loss) {
  for (int64_t sample = 0; sample < samples; ++sample) {
    double total = 0;
    const int64_t first = sample * a.per_sample, last = first + a.per_sample;
    for (int64_t index = first / kChunk; index * kChunk < last; ++index) total += a.partial[index + sample];
    loss[sample] = static_cast<C>(mean ? total / static_cast<double>(a.per_sample) : total);
  }
}

int64_t share(const Tensor& whole, const Tensor& parts) {
  return parts.numel() == 0 ? 0 : whole.numel() / parts.numel();
}

template <typename C>
void run(Args<C> a, const Tensor& sigma, Tensor& loss, bool sums, bool mean) {
  const int64_t chunks = (a.numel + kChunk - 1) / kChunk;
  std::vector<double> partial(sums ? chunks + loss.numel() : 0);
  C* out = static_cast<C*>(loss.data_ptr());
  a.partial = partial.data();
  a.elementwise = sums ? nullptr : out;
  a.sigma = static_cast<const C*>(sigma.data_ptr());
  a.slope = C(2) / static_cast<C>(mean ? std::max<int64_t>(1, a.per_sample) : 1);
  const auto body = use_avx2() ? chunks_avx2<C> : chunks_portable<C>;
  torch::stable::parallel_for(0, chunks, kGrain, [&](int64_t begin, int64_t end) { body(a, begin, end); });
  if (sums) finish(a, loss.numel(), mean, out);
}

Tensor empty_loss(const Tensor& F, const std::string& reduction, ScalarType type) {
  if (reduction == "none") return torch::stable::new_empty(F, F.sizes(), type);
  if (reduction == "sample") return torch::stable::new_empty(F, {F.size(0)}, type);
  return torch::stable::new_empty(F, {}, type);
}

// float16 can't hold the small gradients of a mean before a loss scale is applied.
Tensor empty_gradient(const Tensor& input, bool wanted) {
  const ScalarType type = input.scalar_type() == ScalarType::Half ? ScalarType::Float : input.scalar_type();
  return wanted ? torch::stable::new_empty(input, input.sizes(), type) : torch::stable::new_empty(input, {0}, type);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> edm_loss_cpu(const Tensor& F_in, std::optional<Tensor> z_in,
                                                        const Tensor& y_in, const Tensor& sigma_in, double sigma_data,
                                                        std::string reduction, bool z_scaled, int64_t seed,
                                                        int64_t offset, bool want_F, bool want_z, bool want_y) {
  const Tensor F = torch::stable::contiguous(F_in), y = torch::stable::contiguous(y_in);
  const Tensor z = z_in ? torch::stable::contiguous(*z_in) : y, sigma = torch::stable::contiguous(sigma_in);
  Tensor loss = empty_loss(F, reduction, sigma.scalar_type());
  Tensor grad_F = empty_gradient(F, want_F), grad_z = empty_gradient(z, want_z), grad_y = empty_gradient(y, want_y);
  const auto call = [&](auto zero) {
    using C = decltype(zero);
    const Args<C> args{Array(F), Array(y), z_in ? Array(z) : Array(), z_scaled,
                       want_F ? Array(grad_F) : Array(), want_z ? Array(grad_z) : Array(),
                       want_y ? Array(grad_y) : Array(), F.numel(), share(F, sigma), share(F, loss),
                       static_cast<C>(sigma_data), static_cast<uint64_t>(seed), static_cast<uint32_t>(offset)};
    run(args, sigma, loss, reduction != "none", reduction == "mean" || reduction == "sample");
  };
  sigma.scalar_type() == ScalarType::Double ? call(0.0) : call(0.0f);
  return {loss, grad_F, grad_z, grad_y};
}

}  // namespace dbk
