// The kernel by its recurrence abar^(l+1) = abar^l abar, all n side by side in float64: nothing of size H N
// L.
#include <spade_ext/diagonal/diagonal_cpu.h>
#include <torch/library.h>

#include <vector>

namespace spade_ext::diagonal_cpu {

template <class T>
struct KernelProblem : System<T> {
  int64_t C, H, L;
  Values<T> c;    // (C, H, N)
  double factor;  // k = factor * Re sum: a complex sum stands for itself and its conjugate, but not in dss

  KernelProblem(const at::Tensor& w, const at::Tensor& c_, const OptionalTensor& log_dt, int64_t length,
                OptionalString disc, double rate)
      : System<T>(w, log_dt, diagonal_shapes::parse_disc("diagonal_kernel", disc, false), rate, length),
        C(c_.size(0)),
        H(c_.size(1)),
        L(length),
        c(c_),
        factor(std::is_same_v<T, double> || this->disc == Disc::dss ? 1.0 : 2.0) {}
};

template <class T, class scalar_t>
void kernel_row(const KernelProblem<T>& p, int64_t c, int64_t h, scalar_t* k) {
  Lanes<T> z(p.N), abar(p.N);
  for (int64_t n = 0; n < p.N; ++n) {
    const auto d = p.discrete(h, n);
    abar.set(n, d.abar);
    z.set(n, d.scale * p.c.data[(c * p.H + h) * p.N + n]);
  }
  for (int64_t l = 0; l < p.L; ++l) {
    if (l % kFlushEvery == 0) z.flush();
    k[l] = static_cast<scalar_t>(p.factor * sum(z));
    multiply(z, abar);
  }
}

// With P = sum_l g[l] abar^l and Q = sum_l l g[l] abar^(l-1), dk = Re(P dcbar + cbar Q dabar), summed over n.
template <class T>
struct PowerSums {
  Lanes<T> P, Q;
  explicit PowerSums(int64_t N) : P(N, 0), Q(N, 0) {}
};

template <class T, class scalar_t>
std::vector<PowerSums<T>> power_sums(const KernelProblem<T>& p, int64_t h, const scalar_t* grad_k) {
  Lanes<T> power(p.N, 1), abar(p.N);
  for (int64_t n = 0; n < p.N; ++n) abar.set(n, p.discrete(h, n).abar);
  std::vector<PowerSums<T>> sums;
  for (int64_t c = 0; c < p.C; ++c) sums.emplace_back(p.N);

  for (int64_t l = 0; l < p.L; ++l) {
    if (l % kFlushEvery == 0) power.flush();
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
void backward_row(const KernelProblem<T>& p, int64_t h, const scalar_t* grad_k, T* grad_w_row, T* grad_c,
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

at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                           int64_t length, OptionalString disc, double rate) {
  diagonal_shapes::check_kernel(w, c, log_dt, length, disc, rate);
  const auto k = at::empty({c.size(0), c.size(1), length}, c.options());
  dispatch(w, [&]<class T, class scalar_t>() {
    const KernelProblem<T> p(w, c, log_dt, length, disc, rate);
    scalar_t* data = k.data_ptr<scalar_t>();
    parallel_for_each(p.C * p.H, [&](int64_t row) { kernel_row(p, row / p.H, row % p.H, data + row * p.L); });
  });
  return k;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> diagonal_kernel_backward(
    const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
    OptionalString disc, double rate, std::array<bool, 3> output_mask) {
  diagonal_shapes::check_kernel_backward(grad_k, w, c, log_dt, disc, rate, output_mask);
  const auto contiguous = grad_k.contiguous();
  const auto grad_c = at::zeros(c.sizes(), at::kDouble), grad_log_dt = at::zeros({c.size(1)}, at::kDouble);
  const auto grad_w = dispatch(w, [&]<class T, class scalar_t>() {
    const KernelProblem<T> p(w, c, log_dt, grad_k.size(2), disc, rate);
    const Values<T> rows = Values<T>::zeros(p.H, p.N), by_c(grad_c);
    const Values<double> by_log_dt(grad_log_dt);
    const scalar_t* g = contiguous.data_ptr<scalar_t>();
    if (p.L > 0) {
      parallel_for_each(
          p.H, [&](int64_t h) { backward_row(p, h, g, rows.data + h * p.N, by_c.data, by_log_dt.data); });
    }
    return p.sum_over_channels(rows, p.H);
  });
  return {gradient(output_mask[0], grad_w, w), gradient(output_mask[1], grad_c, w),
          gradient(output_mask[2], grad_log_dt, w)};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("diagonal_kernel", diagonal_kernel);
  m.impl("diagonal_kernel_backward", diagonal_kernel_backward);
}

}  // namespace spade_ext::diagonal_cpu
