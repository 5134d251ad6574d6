// What the CPU kernels of state space models share: their numbers are float64.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace spade_ext {

// A tensor in float64, contiguous: itself where it is so already. T is double, or complex<double> for real
// pairs.
template <class T>
struct Values {
  at::Tensor tensor;
  T* data;

  explicit Values(const at::Tensor& t)
      : tensor(t.to(at::kDouble).contiguous()), data(reinterpret_cast<T*>(tensor.data_ptr<double>())) {}
  // Zeros (rows, N), as pairs where T is complex.
  static Values zeros(int64_t rows, int64_t N) {
    return Values(at::zeros({rows, N, int64_t(sizeof(T) / sizeof(double))}, at::kDouble));
  }
};

// Parts of a state that have decayed to nothing are set to 0 before they become denormal, which is slow.
constexpr int64_t kFlushEvery = 64;  // tokens

// x (n), real numbers or complex ones.
template <class T>
void flush(T* x, int64_t n) {
  constexpr double kNothing = 1e-200;
  double* parts = reinterpret_cast<double*>(x);
  for (int64_t i = 0; i < n * int64_t(sizeof(T) / sizeof(double)); ++i) {
    if (std::abs(parts[i]) < kNothing) parts[i] = 0;
  }
}

}  // namespace spade_ext
