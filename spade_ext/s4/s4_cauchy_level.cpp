// Compiled once a level, with CPU_CAPABILITY naming it (core/row_products_level.cpp).
#include <ATen/cpu/vec/vec.h>
#include <spade_ext/s4/s4_cauchy.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<double>;
constexpr int64_t kSize = Vec::size();

// The same complex number at several nodes.
struct Complex {
  Vec re, im;

  static Complex load(const double* planes, int64_t plane, int64_t node) {
    const double* source = planes + plane * kPlane + node;
    return {Vec::loadu(source), Vec::loadu(source + kNodes)};
  }
  void store(double* planes, int64_t plane, int64_t node) const {
    double* target = planes + plane * kPlane + node;
    re.store(target);
    im.store(target + kNodes);
  }
};

Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
Complex operator*(Complex a, Complex b) {
  return {at::vec::fmsub(a.re, b.re, a.im * b.im), at::vec::fmadd(a.re, b.im, a.im * b.re)};
}
Complex operator*(Vec a, Complex b) { return {a * b.re, a * b.im}; }
Complex conj(Complex a) { return {a.re, a.im.neg()}; }
Complex reciprocal(Complex a) { return Vec(1.0) / at::vec::fmadd(a.re, a.re, a.im * a.im) * conj(a); }
// Re(a b)
Vec real_product(Complex a, Complex b) { return at::vec::fmsub(a.re, b.re, a.im * b.im); }
// The larger of its parts' sizes.
Vec size(Complex a) { return at::vec::maximum(a.re.abs(), a.im.abs()); }

double sum(Vec x) {
  double lanes[kSize], total = 0;
  x.store(lanes);
  for (int64_t i = 0; i < kSize; ++i) total += lanes[i];
  return total;
}

// D = cosh^2 rho + sinh^2 + 2 sinh cosh alpha
void reciprocals(const CauchyBlock& x) {
  for (int64_t node = 0; node < kNodes; node += kSize) {
    const Complex constant = Complex::load(x.nodes, kSinhSinh, node);
    const Complex by_alpha = Complex::load(x.nodes, kSinhCosh, node);
    const Complex by_rho = Complex::load(x.nodes, kCoshCosh, node);
    for (int64_t n = 0; n < x.N; ++n) {
      const Vec rho(x.rho[n]), alpha(x.alpha[n]);
      const Complex d = {at::vec::fmadd(by_rho.re, rho, at::vec::fmadd(by_alpha.re, alpha, constant.re)),
                         at::vec::fmadd(by_rho.im, rho, at::vec::fmadd(by_alpha.im, alpha, constant.im))};
      conj(reciprocal(d)).store(x.reciprocals, n, node);
    }
  }
}

// x <- a^-1 for a (n, n), overwritten: Gauss-Jordan elimination. No row changes place: the Hermitian part of
// a is at least the identity's, and so is that of what remains. Rows are scaled by their largest element.
// Where dependent rows of p leave a pivot that is a rounding error, it becomes one that is sure to be
// positive.
void invert(int64_t n, double* a, double* x, int64_t node) {
  if (n == 1) return reciprocal(Complex::load(a, 0, node)).store(x, 0, node);
  const Vec rounding(0x1p-48), zero(0.0), one(1.0);
  for (int64_t i = 0; i < n; ++i) {
    Vec largest(0.0);
    for (int64_t j = 0; j < n; ++j)
      largest = at::vec::maximum(largest, size(Complex::load(a, i * n + j, node)));
    const Vec scale = one / largest;
    for (int64_t j = 0; j < n; ++j) {
      (scale * Complex::load(a, i * n + j, node)).store(a, i * n + j, node);
      Complex{i == j ? scale : zero, zero}.store(x, i * n + j, node);
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    const Complex pivot = Complex::load(a, k * n + k, node);
    const Vec lost = size(pivot) < rounding;
    const Complex inverse =
        reciprocal({Vec::blendv(pivot.re, rounding, lost), Vec::blendv(pivot.im, zero, lost)});
    auto scale = [&](double* planes, int64_t j) {
      (inverse * Complex::load(planes, k * n + j, node)).store(planes, k * n + j, node);
    };
    for (int64_t j = k + 1; j < n; ++j) scale(a, j);
    for (int64_t j = 0; j < n; ++j) scale(x, j);
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const Complex factor = Complex::load(a, i * n + k, node);
      auto subtract = [&](double* planes, int64_t j) {
        (Complex::load(planes, i * n + j, node) - factor * Complex::load(planes, k * n + j, node))
            .store(planes, i * n + j, node);
      };
      for (int64_t j = k + 1; j < n; ++j) subtract(a, j);
      for (int64_t j = 0; j < n; ++j) subtract(x, j);
    }
  }
}

// One vector of nodes of a block.
struct At {
  const CauchyBlock& x;
  int64_t node;

  Complex sinh() const { return Complex::load(x.nodes, kSinh, node); }
  Complex cosh() const { return Complex::load(x.nodes, kCosh, node); }
  Complex kappa() const { return Vec(x.delta) * cosh(); }
  // dt/2 e^(-zeta/2)
  Complex front() const { return Vec(x.delta) * (sinh() + cosh()); }
  Complex sum(int64_t output, int64_t input) const {
    return Complex::load(x.sums, output * (x.M + x.R) + input, node);
  }
  Complex xi(int64_t r, int64_t m) const { return Complex::load(x.xi, r * x.M + m, node); }
  Complex eta(int64_t i, int64_t r) const { return Complex::load(x.eta, i * x.R + r, node); }

  void solve() const {
    for (int64_t u = 0; u < x.K; ++u) {  // S, in place of the first sums
      const Complex nu = Complex::load(x.sums, u, node), mu = Complex::load(x.sums, x.K + u, node);
      (cosh() * conj(nu) + sinh() * conj(mu)).store(x.sums, u, node);
    }
    const Complex zero = {Vec(0.0), Vec(0.0)}, one = {Vec(1.0), Vec(0.0)};
    for (int64_t r = 0; r < x.R; ++r) {
      for (int64_t k = 0; k < x.R; ++k) {
        ((r == k ? one : zero) + kappa() * sum(x.C + r, x.M + k)).store(x.matrix, r * x.R + k, node);
      }
    }
    invert(x.R, x.matrix, x.inverse, node);
    auto inverse = [&](int64_t r, int64_t k) { return Complex::load(x.inverse, r * x.R + k, node); };
    for (int64_t r = 0; r < x.R; ++r) {
      for (int64_t m = 0; m < x.M; ++m) {
        Complex total = zero;
        for (int64_t k = 0; k < x.R; ++k) total = total + inverse(r, k) * sum(x.C + k, m);
        total.store(x.xi, r * x.M + m, node);
      }
      for (int64_t i = 0; i < x.C; ++i) {
        Complex total = zero;
        for (int64_t k = 0; k < x.R; ++k) total = total + sum(i, x.M + k) * inverse(k, r);
        total.store(x.eta, i * x.R + r, node);
      }
    }
    for (int64_t i = 0; i < x.C; ++i) {
      for (int64_t m = 0; m < x.M; ++m) {
        Complex low_rank = zero;
        for (int64_t r = 0; r < x.R; ++r) low_rank = low_rank + sum(i, x.M + r) * xi(r, m);
        (front() * (sum(i, m) - kappa() * low_rank)).store(x.values, i * x.M + m, node);
      }
    }
  }
};

void solve(const CauchyBlock& x) {
  for (int64_t node = 0; node < kNodes; node += kSize) At{x, node}.solve();
}

// By S: gamma, -kappa gamma xi, -kappa eta gamma and kappa^2 eta gamma xi, gamma being front * by_values.
void differentiate_solve(const CauchyBlock& x, CauchyGradient& gradient) {
  Vec log_front(0.0), log_kappa(0.0);
  for (int64_t node = 0; node < kNodes; node += kSize) {
    const At at{x, node};
    const Complex minus_kappa = Vec(-1.0) * at.kappa(), zero = {Vec(0.0), Vec(0.0)};
    auto by_sum = [&](int64_t output, int64_t input) {
      return Complex::load(x.factors, output * (x.M + x.R) + input, node);
    };
    auto set = [&](int64_t output, int64_t input, Complex value) {
      value.store(x.factors, output * (x.M + x.R) + input, node);
    };
    for (int64_t i = 0; i < x.C; ++i) {
      for (int64_t m = 0; m < x.M; ++m) {
        const Complex by_value = Complex::load(x.by_values, i * x.M + m, node);
        set(i, m, at.front() * by_value);
        log_front = log_front + real_product(by_value, Complex::load(x.values, i * x.M + m, node));
      }
      for (int64_t r = 0; r < x.R; ++r) {
        Complex total = zero;
        for (int64_t m = 0; m < x.M; ++m) total = total + by_sum(i, m) * at.xi(r, m);
        set(i, x.M + r, minus_kappa * total);
        log_kappa = log_kappa + real_product(at.eta(i, r), by_sum(i, x.M + r));
      }
    }
    for (int64_t r = 0; r < x.R; ++r) {
      for (int64_t input = 0; input < x.M + x.R; ++input) {
        Complex total = zero;
        for (int64_t i = 0; i < x.C; ++i) total = total + at.eta(i, r) * by_sum(i, input);
        set(x.C + r, input, minus_kappa * total);
      }
    }
    const Complex sinh = at.sinh(), cosh = at.cosh();
    for (int64_t u = 0; u < x.K; ++u) {
      const Complex value = Complex::load(x.factors, u, node);
      (cosh * value).store(x.factors, u, node);
      (sinh * value).store(x.factors, x.K + u, node);
    }
  }
  gradient.log_front += sum(log_front);
  gradient.log_kappa += sum(log_kappa);
}

// out (rows, N) += factors . reciprocals, a few rows and states, as Re(f / D) = (Re f, Im f) . conj(1/D)
template <int rows, int states>
void dots(const double* factors, const double* reciprocals, double* out, int64_t N) {
  Vec sums[rows][states];
  for (int r = 0; r < rows; ++r) {
    for (int s = 0; s < states; ++s) sums[r][s] = Vec(0.0);
  }
  for (int64_t i = 0; i < kPlane; i += kSize) {
    Vec columns[states];
    for (int s = 0; s < states; ++s) columns[s] = Vec::loadu(reciprocals + s * kPlane + i);
    for (int r = 0; r < rows; ++r) {
      const Vec factor = Vec::loadu(factors + r * kPlane + i);
      for (int s = 0; s < states; ++s) sums[r][s] = at::vec::fmadd(factor, columns[s], sums[r][s]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int s = 0; s < states; ++s) out[r * N + s] += sum(sums[r][s]);
  }
}

template <int rows>
void dots_of_rows(const CauchyBlock& x, int64_t row, double* out) {
  const double* factors = x.factors + row * kPlane;
  int64_t n = 0;
  for (; n + 2 <= x.N; n += 2) dots<rows, 2>(factors, x.reciprocals + n * kPlane, out + row * x.N + n, x.N);
  if (n < x.N) dots<rows, 1>(factors, x.reciprocals + n * kPlane, out + row * x.N + n, x.N);
}

// By rho and alpha of a few states: F = sum_u weight factor stays in registers, d(1 / D) = -1 / D^2 dD.
template <int states>
void differentiate_states(const CauchyBlock& x, int64_t n, CauchyGradient& gradient) {
  const int64_t rows = 2 * x.K;
  const double *weights = x.nu_mu + n, *reciprocals = x.reciprocals + n * kPlane;
  Vec by_rho[states], by_alpha[states];
  for (int s = 0; s < states; ++s) by_rho[s] = by_alpha[s] = Vec(0.0);
  for (int64_t node = 0; node < kNodes; node += kSize) {
    Complex totals[states];
    for (int s = 0; s < states; ++s) totals[s] = {Vec(0.0), Vec(0.0)};
    for (int64_t row = 0; row < rows; ++row) {
      const Complex factor = Complex::load(x.factors, row, node);
      for (int s = 0; s < states; ++s) {
        const Vec weight(weights[row * x.N + s]);
        totals[s] = {at::vec::fmadd(factor.re, weight, totals[s].re),
                     at::vec::fmadd(factor.im, weight, totals[s].im)};
      }
    }
    const Complex of_rho = Complex::load(x.nodes, kCoshCosh, node);
    const Complex of_alpha = Complex::load(x.nodes, kSinhCosh, node);
    for (int s = 0; s < states; ++s) {
      const Complex q = conj(Complex::load(reciprocals, s, node)), by_d = q * q * totals[s];
      by_rho[s] = by_rho[s] - real_product(of_rho, by_d);
      by_alpha[s] = by_alpha[s] - real_product(of_alpha, by_d);
    }
  }
  for (int s = 0; s < states; ++s) {
    gradient.rho[n + s] += sum(by_rho[s]);
    gradient.alpha[n + s] += sum(by_alpha[s]);
  }
}

void differentiate_sums(const CauchyBlock& x, CauchyGradient& gradient) {
  const int64_t rows = 2 * x.K;
  int64_t row = 0, n = 0;
  for (; row + 4 <= rows; row += 4) dots_of_rows<4>(x, row, gradient.nu_mu);
  for (; row < rows; ++row) dots_of_rows<1>(x, row, gradient.nu_mu);
  for (; n + 4 <= x.N; n += 4) differentiate_states<4>(x, n, gradient);
  for (; n < x.N; ++n) differentiate_states<1>(x, n, gradient);
}

}  // namespace

extern const S4Cauchy s4_cauchy = {reciprocals, solve, differentiate_solve, differentiate_sums};

}  // namespace spade_ext::CPU_CAPABILITY
