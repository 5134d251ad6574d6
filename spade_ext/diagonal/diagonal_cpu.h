// What the family's CPU kernels share: the state matrix, and the N numbers of a channel side by side.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/core/values.h>
#include <spade_ext/diagonal/diagonal_shapes.h>

#include <algorithm>
#include <type_traits>

namespace spade_ext::diagonal_cpu {

using diagonal_math::Disc;
using diagonal_math::Discrete;
using OptionalString = std::optional<std::string_view>;

inline double real(double x) { return x; }
inline double real(std::complex<double> x) { return x.real(); }
inline double imag(double) { return 0; }
inline double imag(std::complex<double> x) { return x.imag(); }
inline double conj(double x) { return x; }

// The state matrix of all channels.
template <class T>
struct System {
  int64_t S, N;
  Values<T> w;                           // (S, N)
  std::optional<Values<double>> log_dt;  // (H,)
  Disc disc;
  double rate;
  int64_t length;  // "dss" depends on it

  System(const at::Tensor& w_, const OptionalTensor& log_dt_, Disc disc_, double rate_ = 1,
         int64_t length_ = 0)
      : S(w_.size(0)), N(w_.size(1)), w(w_), disc(disc_), rate(rate_), length(length_) {
    if (is_given(log_dt_)) log_dt.emplace(*log_dt_);
  }

  double dt(int64_t h) const { return log_dt ? std::exp(log_dt->data[h]) * rate : 1.0; }
  Discrete<T> discrete(int64_t h, int64_t n) const {
    return diagonal_math::discretize<T>(disc, w.data[(h % S) * N + n], dt(h), length);
  }
  // From a row for each of H channels, (H, N): row s is the sum of rows h with h mod S = s, in order.
  at::Tensor sum_over_channels(const Values<T>& rows, int64_t H) const {
    Values<T> sum(at::zeros(w.tensor.sizes(), at::kDouble));
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t n = 0; n < N; ++n) sum.data[(h % S) * N + n] += rows.data[h * N + n];
    }
    return sum.tensor;
  }
};

// N numbers as separate real and imaginary parts, so that n runs through the vector lanes.
template <class T>
struct Lanes {
  at::Tensor memory;
  double *re, *im;

  explicit Lanes(int64_t size)
      : memory(at::empty({2, size}, at::kDouble)), re(memory.data_ptr<double>()), im(re + size) {}
  void set(int64_t n, T value) { re[n] = real(value), im[n] = imag(value); }
  T get(int64_t n) const {
    if constexpr (std::is_same_v<T, double>)
      return re[n];
    else
      return {re[n], im[n]};
  }
};

// Calls body<T, scalar_t>() for the parameters' kind and dtype.
template <class Body>
auto dispatch(const at::Tensor& w, const Body& body) {
  return AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "diagonal", [&] {
    if (diagonal_shapes::has_pairs(w)) return body.template operator()<std::complex<double>, scalar_t>();
    return body.template operator()<double, scalar_t>();
  });
}

// A gradient in the dtype of the parameters, or an undefined tensor where none is wanted.
inline at::Tensor gradient(bool wanted, const at::Tensor& t, const at::Tensor& like) {
  return wanted ? t.to(like.scalar_type()) : at::Tensor();
}

}  // namespace spade_ext::diagonal_cpu
