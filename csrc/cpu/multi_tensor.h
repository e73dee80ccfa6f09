// A list of tensors as one index, for kernels that go over a whole list.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops.h"

namespace dbk {

// The tensors behind each other. Each begins at a multiple of eight, so that the eight elements that share a block of random
// words lie in one tensor. Work is cut into units of fixed size whatever the tensors and the threads: so a sum has one
// order, its bits repeat, and threads get equal shares.
class Index {
 public:
  static constexpr int64_t kUnit = 8192;

  explicit Index(const Tensors& tensors) : starts_(1) {
    for (const Tensor& tensor : tensors) {
      numels_.push_back(tensor.numel());
      starts_.push_back(starts_.back() + (tensor.numel() + 7) / 8 * 8);
    }
  }

  int64_t units() const { return (starts_.back() + kUnit - 1) / kUnit; }
  int64_t start(size_t tensor) const { return starts_[tensor]; }

  // each(tensor, begin, end): the pieces of a unit.
  template <typename Each>
  void pieces(int64_t unit, const Each& each) const {
    int64_t at = unit * kUnit;
    const int64_t stop = std::min(at + kUnit, starts_.back());
    size_t t = std::upper_bound(starts_.begin(), starts_.end(), at) - starts_.begin() - 1;
    for (; at < stop; at = starts_[++t]) each(t, at - starts_[t], std::min(stop - starts_[t], numels_[t]));
  }

 private:
  std::vector<int64_t> starts_, numels_;
};

// The 2-norm of contiguous tensors of any floating dtypes together, summed in float64. Kernel: total_norm.cpp.
double norm_of(const Tensors& tensors, const Index& index);

}  // namespace dbk
