// The kernel by its recurrence abar^(l+1) = abar^l abar, all n side by side in float64: nothing of size H N
// L.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/diagonal/diagonal_kernel_shapes.h>
#include <torch/library.h>

#include <algorithm>

namespace spade_ext::diagonal_cpu {

using diagonal_math::Disc;
using diagonal_math::Discrete;
using OptionalString = std::optional<std::string_view>;

double real(double x) { return x; }
double real(std::complex<double> x) { return x.real(); }
double imag(double) { return 0; }
double imag(std::complex<double> x) { return x.imag(); }
double conj(double x) { return x; }

// A parameter in float64; T is double or complex<double>, stored as real pairs.
template <class T>
struct Values {
  at::Tensor tensor;
  T* data;

  explicit Values(at::Tensor t)
      : tensor(std::move(t)), data(reinterpret_cast<T*>(tensor.data_ptr<double>())) {}
  static Values of(const at::Tensor& t) { return Values(t.to(at::kDouble).contiguous()); }
  static Values zeros_like(const at::Tensor& t) {
    return Values(at::zeros(t.sizes(), t.options().dtype(at::kDouble)));
  }
};

template <class T>
struct Problem {
  int64_t S, N, C, H, L;
  Values<T> w, c;                        // (S, N), (C, H, N)
  std::optional<Values<double>> log_dt;  // (H,)
  Disc disc;
  double rate;
  double factor;  // k = factor * Re sum: a complex sum stands for itself and its conjugate, but not in dss

  Problem(const at::Tensor& w_, const at::Tensor& c_, const OptionalTensor& log_dt_, int64_t length,
          OptionalString disc_, double rate_)
      : S(w_.size(0)),
        N(w_.size(1)),
        C(c_.size(0)),
        H(c_.size(1)),
        L(length),
        w(Values<T>::of(w_)),
        c(Values<T>::of(c_)),
        disc(diagonal_kernel_shapes::parse_disc(disc_)),
        rate(rate_),
        factor(std::is_same_v<T, double> || disc == Disc::dss ? 1.0 : 2.0) {
    if (is_given(log_dt_)) log_dt = Values<double>::of(*log_dt_);
  }

  double dt(int64_t h) const { return log_dt ? std::exp(log_dt->data[h]) * rate : 1.0; }
  Discrete<T> discrete(int64_t h, int64_t n) const {
    return diagonal_math::discretize<T>(disc, w.data[(h % S) * N + n], dt(h), L);
  }
};

// N numbers as separate real and imaginary parts, so that n runs through the vector lanes.
template <class T>
struct Lanes {
  int64_t N;
  at::Tensor memory;
  double *re, *im;

  explicit Lanes(int64_t size)
      : N(size), memory(at::empty({2, size}, at::kDouble)), re(memory.data_ptr<double>()), im(re + size) {}
  void set(int64_t n, T value) { re[n] = real(value), im[n] = imag(value); }
  void fill(T value) {
    for (int64_t n = 0; n < N; ++n) set(n, value);
  }
  T get(int64_t n) const {
    if constexpr (std::is_same_v<T, double>)
      return re[n];
    else
      return {re[n], im[n]};
  }
};

template <class T>
double sum(const Lanes<T>& z) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t n = 0; n < z.N; ++n) total += z.re[n];
  return total;
}

// z <- z a. Im stays untouched where all is real.
template <class T>
void multiply(Lanes<T>& z, const Lanes<T>& a) {
  double* __restrict re = z.re;
  double* __restrict im = z.im;
#pragma omp simd
  for (int64_t n = 0; n < z.N; ++n) {
    if constexpr (std::is_same_v<T, double>) {
      re[n] *= a.re[n];
    } else {
      const double product = re[n] * a.re[n] - im[n] * a.im[n];
      im[n] = re[n] * a.im[n] + im[n] * a.re[n];
      re[n] = product;
    }
  }
}

// total <- total + x z for a real x.
template <class T>
void add_scaled(Lanes<T>& total, double x, const Lanes<T>& z) {
  double* __restrict re = total.re;
  double* __restrict im = total.im;
#pragma omp simd
  for (int64_t n = 0; n < z.N; ++n) {
    re[n] += x * z.re[n];
    if constexpr (!std::is_same_v<T, double>) im[n] += x * z.im[n];
  }
}

// Powers that have decayed to nothing are set to 0 before they become denormal, which is slow.
template <class T>
void flush(Lanes<T>& z) {
  constexpr double kNothing = 1e-200;
  for (int64_t n = 0; n < z.N; ++n) {
    if (std::abs(z.re[n]) < kNothing) z.re[n] = 0;
    if (std::abs(z.im[n]) < kNothing) z.im[n] = 0;
  }
}
constexpr int64_t kFlushEvery = 64;

template <class T, class scalar_t>
void kernel_row(const Problem<T>& p, int64_t c, int64_t h, scalar_t* k) {
  Lanes<T> z(p.N), abar(p.N);
  z.fill(0), abar.fill(0);
  for (int64_t n = 0; n < p.N; ++n) {
    const auto d = p.discrete(h, n);
    abar.set(n, d.abar);
    z.set(n, d.scale * p.c.data[(c * p.H + h) * p.N + n]);
  }
  for (int64_t l = 0; l < p.L; ++l) {
    if (l % kFlushEvery == 0) flush(z);
    k[l] = static_cast<scalar_t>(p.factor * sum(z));
    multiply(z, abar);
  }
}

// With P = sum_l g[l] abar^l and Q = sum_l l g[l] abar^(l-1), dk = Re(P dcbar + cbar Q dabar), summed over n.
template <class T>
struct PowerSums {
  Lanes<T> P, Q;
  explicit PowerSums(int64_t N) : P(N), Q(N) { P.fill(0), Q.fill(0); }
};

template <class T, class scalar_t>
std::vector<PowerSums<T>> power_sums(const Problem<T>& p, int64_t h, const scalar_t* grad_k) {
  Lanes<T> power(p.N), abar(p.N);
  power.fill(1), abar.fill(0);
  for (int64_t n = 0; n < p.N; ++n) abar.set(n, p.discrete(h, n).abar);
  std::vector<PowerSums<T>> sums;
  for (int64_t c = 0; c < p.C; ++c) sums.emplace_back(p.N);

  for (int64_t l = 0; l < p.L; ++l) {
    if (l % kFlushEvery == 0) flush(power);
    for (int64_t c = 0; c < p.C; ++c) {
      const scalar_t* g = grad_k + (c * p.H + h) * p.L;
      add_scaled(sums[c].P, double(g[l]), power);
      if (l + 1 < p.L) add_scaled(sums[c].Q, double(l + 1) * double(g[l + 1]), power);
    }
    multiply(power, abar);
  }
  return sums;
}

// Writes row h of grad_c and grad_log_dt, and what channel h adds to grad_w. The complex derivative of a real
// function is stored conjugated, as autograd does.
template <class T, class scalar_t>
void backward_row(const Problem<T>& p, int64_t h, const scalar_t* grad_k, T* grad_w_row, T* grad_c,
                  double* grad_log_dt) {
  const auto sums = power_sums(p, h, grad_k);
  double by_dt = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    const auto d = p.discrete(h, n);
    T by_abar = 0, by_scale = 0;
    for (int64_t c = 0; c < p.C; ++c) {
      const int64_t i = (c * p.H + h) * p.N + n;
      const T by_cbar = p.factor * sums[c].P.get(n);
      by_abar += p.factor * d.scale * p.c.data[i] * sums[c].Q.get(n);
      by_scale += p.c.data[i] * by_cbar;
      grad_c[i] = conj(d.scale * by_cbar);
    }
    grad_w_row[n] = conj(d.abar_w * by_abar + d.scale_w * by_scale);
    by_dt += real(d.abar_dt * by_abar + d.scale_dt * by_scale);
  }
  grad_log_dt[h] = p.dt(h) * by_dt;
}

template <class T, class scalar_t>
void forward_impl(const Problem<T>& p, const at::Tensor& k) {
  scalar_t* data = k.data_ptr<scalar_t>();
  parallel_for_each(p.C * p.H, [&](int64_t row) { kernel_row(p, row / p.H, row % p.H, data + row * p.L); });
}

template <class T, class scalar_t>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_impl(const Problem<T>& p, const at::Tensor& grad_k) {
  const auto zeros = [](at::IntArrayRef sizes) { return at::zeros(sizes, at::kDouble); };
  Values<T> grad_w = Values<T>::zeros_like(p.w.tensor), grad_c = Values<T>::zeros_like(p.c.tensor);
  Values<double> grad_log_dt(zeros({p.H}));
  Values<T> rows(zeros({p.H, p.N, int64_t(sizeof(T) / sizeof(double))}));
  if (p.L == 0) return {grad_w.tensor, grad_c.tensor, grad_log_dt.tensor};
  const scalar_t* g = grad_k.data_ptr<scalar_t>();
  parallel_for_each(
      p.H, [&](int64_t h) { backward_row(p, h, g, rows.data + h * p.N, grad_c.data, grad_log_dt.data); });
  for (int64_t h = 0; h < p.H; ++h) {
    for (int64_t n = 0; n < p.N; ++n) grad_w.data[(h % p.S) * p.N + n] += rows.data[h * p.N + n];
  }
  return {grad_w.tensor, grad_c.tensor, grad_log_dt.tensor};
}

// Calls body<T, scalar_t>(problem) for the parameters' kind and dtype.
template <class Body>
auto dispatch(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt, int64_t length,
              OptionalString disc, double rate, const Body& body) {
  return AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "diagonal_kernel", [&] {
    if (diagonal_kernel_shapes::has_pairs(w)) {
      using T = std::complex<double>;
      return body.template operator()<T, scalar_t>(Problem<T>(w, c, log_dt, length, disc, rate));
    }
    return body.template operator()<double, scalar_t>(Problem<double>(w, c, log_dt, length, disc, rate));
  });
}

at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                           int64_t length, OptionalString disc, double rate) {
  diagonal_kernel_shapes::check(w, c, log_dt, length, disc, rate);
  auto k = at::empty({c.size(0), c.size(1), length}, c.options());
  dispatch(w, c, log_dt, length, disc, rate,
           [&]<class T, class scalar_t>(const Problem<T>& p) { forward_impl<T, scalar_t>(p, k); });
  return k;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> diagonal_kernel_backward(
    const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
    OptionalString disc, double rate, std::array<bool, 3> output_mask) {
  diagonal_kernel_shapes::check_backward(grad_k, w, c, log_dt, disc, rate, output_mask);
  const auto g = grad_k.contiguous();
  auto [grad_w, grad_c, grad_log_dt] = dispatch(
      w, c, log_dt, grad_k.size(2), disc, rate,
      [&]<class T, class scalar_t>(const Problem<T>& p) { return backward_impl<T, scalar_t>(p, g); });
  auto output = [&](bool wanted, const at::Tensor& t) {
    return wanted ? t.to(w.scalar_type()) : at::Tensor();
  };
  return {output(output_mask[0], grad_w), output(output_mask[1], grad_c),
          output(output_mask[2], grad_log_dt)};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("diagonal_kernel", diagonal_kernel);
  m.impl("diagonal_kernel_backward", diagonal_kernel_backward);
}

}  // namespace spade_ext::diagonal_cpu
