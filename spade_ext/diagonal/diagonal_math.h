// Discretisations of x' = w x + u and their derivatives, for real and for complex w. Equations: README.md.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>

namespace spade_ext::diagonal_math {

enum class Disc { none, zoh, bilinear, dss };

inline double expm1(double x) { return std::expm1(x); }

// e^(x + iy) - 1 without cancellation near 0.
inline std::complex<double> expm1(std::complex<double> z) {
  const double half_sine = std::sin(0.5 * z.imag());
  return {std::expm1(z.real()) * std::cos(z.imag()) - 2 * half_sine * half_sine,
          std::exp(z.real()) * std::sin(z.imag())};
}

// phi(x) = (e^x - 1) / x and its derivative.
template <class T>
struct Phi {
  T value{}, slope{};
};

template <class T>
Phi<T> phi(T x) {
  if (std::abs(x) >= 0.1) {
    const T value = expm1(x) / x;
    return {value, (std::exp(x) - value) / x};
  }
  Phi<T> sum;  // x^k / (k + 1)!: the closed forms cancel here
  T power = 1;
  double factorial = 1;
  for (int k = 0; k <= 10; ++k) {
    sum.value += power / factorial;
    sum.slope += power * (k + 1.0) / (factorial * (k + 2.0));
    power *= x;
    factorial *= k + 2.0;
  }
  return sum;
}

// abar and the factor cbar = scale * c of one (w, dt), with their derivatives by w and by dt.
template <class T>
struct Discrete {
  T abar, abar_w, abar_dt;
  T scale, scale_w, scale_dt;
};

template <class T>
Discrete<T> discretize(Disc disc, T w, double dt, int64_t length) {
  const T x = w * dt;
  switch (disc) {
    case Disc::none: {
      const T abar = std::exp(w);
      return {abar, abar, T(0), T(1), T(0), T(0)};
    }
    case Disc::zoh: {
      const T abar = std::exp(x);
      const Phi<T> p = phi(x);
      return {abar, dt * abar, w * abar, dt * p.value, dt * dt * p.slope, abar};
    }
    case Disc::bilinear: {
      const T inverse = 1.0 / (1.0 - 0.5 * x);
      const T abar = (1.0 + 0.5 * x) * inverse, square = inverse * inverse;
      return {abar, dt * square, w * square, dt * inverse, 0.5 * dt * dt * square, square};
    }
    case Disc::dss: {
      const double L = double(length);
      const T abar = std::exp(x), denominator = expm1(x * L);
      const T quotient = expm1(x) / denominator;
      const T slope = (abar - quotient * L * std::exp(x * L)) / denominator;
      return {abar, dt * abar, w * abar, quotient / w, (dt * slope - quotient / w) / w, slope};
    }
  }
  return {};
}

}  // namespace spade_ext::diagonal_math
