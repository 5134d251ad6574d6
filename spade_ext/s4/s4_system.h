// One channel's state matrix A = diag(w) - sum_r p_r p_r^* and its bilinear step, in float64. A vector holds
// one of each conjugate pair of states, so that p_r^* x over all states is 2 Re(conj(p_r) . x), a real
// number.
#pragma once

#include <spade_ext/core/values.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <utility>
#include <vector>

namespace spade_ext::s4_cpu {

using complex = std::complex<double>;
using Vector = std::vector<complex>;
using Complexes = Values<complex>;  // a parameter of real pairs

// x <- a^-1 x for a (n, n) and x (n, columns), both overwritten: Gauss-Jordan elimination with pivots that
// are largest relative to their row. Where dependent rows of p leave a pivot that is a rounding error, it
// becomes one that is sure to be positive.
template <class T>
void solve(int64_t n, T* a, T* x, int64_t columns) {
  constexpr double kRounding = 0x1p-48;
  for (int64_t i = 0; i < n; ++i) {
    double largest = 0;
    for (int64_t j = 0; j < n; ++j) largest = std::max(largest, std::abs(a[i * n + j]));
    for (int64_t j = 0; j < n; ++j) a[i * n + j] /= largest;
    for (int64_t j = 0; j < columns; ++j) x[i * columns + j] /= largest;
  }
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i) {
      if (std::abs(a[i * n + k]) > std::abs(a[pivot * n + k])) pivot = i;
    }
    std::swap_ranges(a + k * n, a + (k + 1) * n, a + pivot * n);
    std::swap_ranges(x + k * columns, x + (k + 1) * columns, x + pivot * columns);
    if (std::abs(a[k * n + k]) < kRounding) a[k * n + k] = kRounding;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const T factor = a[i * n + k] / a[k * n + k];
      for (int64_t j = k; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
      for (int64_t j = 0; j < columns; ++j) x[i * columns + j] -= factor * x[k * columns + j];
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t j = 0; j < columns; ++j) x[k * columns + j] /= a[k * n + k];
  }
}

// The state matrix of one channel.
struct StateMatrix {
  int64_t N, R;
  const complex* w;
  Vector p;  // (R, N)

  // w (S, N), p (R, S, N), row s of them.
  StateMatrix(const Complexes& w_, const Complexes& p_, int64_t s)
      : N(w_.tensor.size(1)), R(p_.tensor.size(0)), w(w_.data + s * N), p(R * N) {
    const int64_t S = w_.tensor.size(0);
    for (int64_t r = 0; r < R; ++r) std::copy_n(p_.data + (r * S + s) * N, N, p.data() + r * N);
  }
  const complex* row(int64_t r) const { return p.data() + r * N; }
};

// p^* x over all states, x being those stored.
inline double project(const complex* p, const complex* x, int64_t N) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t n = 0; n < N; ++n) sum += p[n].real() * x[n].real() + p[n].imag() * x[n].imag();
  return 2 * sum;
}

// The bilinear step with delta = dt / 2, in O(N R): Abar = (I - delta A)^-1 (I + delta A), in the form
// 2 (I - delta A)^-1 - I, which needs no product with an A that may be huge.
class BilinearStep {
 public:
  BilinearStep(StateMatrix a, double delta)
      : a_(std::move(a)),
        delta_(delta),
        inverse_(a_.N),
        solved_(a_.N),
        projections_(a_.R),
        capacitance_(a_.R * a_.R) {
    for (int64_t n = 0; n < a_.N; ++n) inverse_[n] = 1.0 / (1.0 - delta * a_.w[n]);
    for (int64_t r = 0; r < a_.R; ++r) {
      for (int64_t n = 0; n < a_.N; ++n) solved_[n] = inverse_[n] * a_.row(r)[n];
      for (int64_t q = 0; q < a_.R; ++q) {
        capacitance_[q * a_.R + r] = (q == r) + delta * project(a_.row(q), solved_.data(), a_.N);
      }
    }
  }

  // One token: x <- Abar x + Bbar u.
  void step(complex* x, const complex* b, double u) {
    for (int64_t n = 0; n < a_.N; ++n) solved_[n] = x[n] + delta_ * u * b[n];
    solve(solved_.data());
    for (int64_t n = 0; n < a_.N; ++n) x[n] = 2.0 * solved_[n] - x[n];
  }

 private:
  // x <- (I - delta A)^-1 x, by Woodbury's formula
  void solve(complex* x) {
    for (int64_t n = 0; n < a_.N; ++n) x[n] *= inverse_[n];
    for (int64_t r = 0; r < a_.R; ++r) projections_[r] = project(a_.row(r), x, a_.N);
    eliminated_ = capacitance_;
    s4_cpu::solve(a_.R, eliminated_.data(), projections_.data(), 1);
    for (int64_t r = 0; r < a_.R; ++r) {
      const complex* p = a_.row(r);
      for (int64_t n = 0; n < a_.N; ++n) x[n] -= delta_ * projections_[r] * (inverse_[n] * p[n]);
    }
  }

  StateMatrix a_;
  double delta_;
  Vector inverse_, solved_;
  std::vector<double> projections_, capacitance_, eliminated_;
};

}  // namespace spade_ext::s4_cpu
