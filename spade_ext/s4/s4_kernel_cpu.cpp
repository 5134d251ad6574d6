// The kernel through its transform: at each node a Cauchy sum and Woodbury's formula. Equations: README.md. A
// task takes a few channels and a block of nodes at a time, so nothing of size H N L is held.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/core/row_products.h>
#include <spade_ext/s4/s4_cauchy.h>
#include <spade_ext/s4/s4_nodes.h>
#include <spade_ext/s4/s4_shapes.h>
#include <spade_ext/s4/s4_system.h>
#include <torch/library.h>

namespace spade_ext::s4_cpu {

struct Problem {
  Complexes w, p, b, c;
  Values<double> log_dt;
  double rate;
  int64_t S, R, N, M, C, H, L;
  int64_t period;              // of what c is truncated to, in taps
  std::vector<Nodes> circles;  // for the first `period` taps, and for what follows

  Problem(const at::Tensor& w_, const at::Tensor& p_, const at::Tensor& b_, const at::Tensor& c_,
          const at::Tensor& log_dt_, int64_t length, int64_t truncation, double rate_)
      : w(w_), p(p_), b(b_), c(c_), log_dt(log_dt_), rate(rate_) {
    S = w_.size(0), R = p_.size(0), N = w_.size(1), M = b_.size(0), C = c_.size(0), H = c_.size(1);
    L = length, period = std::max<int64_t>(std::llrint(double(truncation) / rate), 1);
    circles.emplace_back(period, std::min(L, period), 0.0);
    if (L <= period) return;
    // Taps return after `count` others, smaller by e^(-decay count), and rounding errors grow by e^(decay l).
    const bool is_float = w_.scalar_type() == at::kFloat;
    const double nodes_per_tap = is_float ? 1.5 : 4.0, smallness = is_float ? 1e-8 : 1e-13;
    const int64_t count = smooth_size(std::llrint(nodes_per_tap * double(L - period)) + 1);
    circles.emplace_back(count, L - period, -std::log(smallness) / double(count));
  }

  const complex* b_row(int64_t m, int64_t s) const { return b.data + (m * S + s) * N; }
  const complex* c_row(int64_t i, int64_t h) const { return c.data + (i * H + h) * N; }
  // Channels that share a transform: enough for its speed, with tasks for many threads.
  int64_t group() const { return std::clamp<int64_t>(H / 16, 1, 8); }
  int64_t groups() const { return (H + group() - 1) / group(); }
};

// One channel's system: inputs b and p, outputs c and conj(p).
struct Channel {
  double delta;                           // dt/2
  Vector inputs, outputs, a;              // (M + R, N), (C + R, N), (N): dt/2 w
  std::vector<double> rho, alpha, nu_mu;  // (N), (N), (2 K, N)

  Channel(const Problem& x, int64_t h) : delta(0.5 * std::exp(x.log_dt.data[h]) * x.rate) {
    const int64_t N = x.N, s = h % x.S;
    const StateMatrix matrix(x.w, x.p, s);
    auto append = [&](Vector& rows, const complex* row) { rows.insert(rows.end(), row, row + N); };
    for (int64_t m = 0; m < x.M; ++m) append(inputs, x.b_row(m, s));
    for (int64_t i = 0; i < x.C; ++i) append(outputs, x.c_row(i, h));
    inputs.insert(inputs.end(), matrix.p.begin(), matrix.p.end());
    for (complex p : matrix.p) outputs.push_back(std::conj(p));
    for (int64_t n = 0; n < N; ++n) {
      a.push_back(delta * matrix.w[n]);
      rho.push_back(std::norm(a[n]));
      alpha.push_back(-a[n].real());
    }
    const int64_t K = (x.C + x.R) * (x.M + x.R);
    nu_mu.resize(2 * K * N);
    for (int64_t u = 0; u < K; ++u) {
      for (int64_t n = 0; n < N; ++n) {
        const complex v = outputs[u / (x.M + x.R) * N + n] * inputs[u % (x.M + x.R) * N + n];
        nu_mu[u * N + n] = -2 * (v * std::conj(a[n])).real();
        nu_mu[(K + u) * N + n] = 2 * v.real();
      }
    }
  }
};

// The resolvent of a channel at a block of nodes, and its derivatives.
class Resolvent {
 public:
  explicit Resolvent(const Problem& x) {
    block_.N = x.N, block_.R = x.R, block_.M = x.M, block_.C = x.C;
    const int64_t K = block_.K = (x.C + x.R) * (x.M + x.R);
    const std::pair<double**, int64_t> planes[] = {
        {&block_.reciprocals, x.N},  {&block_.sums, 2 * K},        {&block_.factors, 2 * K},
        {&block_.matrix, x.R * x.R}, {&block_.inverse, x.R * x.R}, {&block_.xi, x.R * x.M},
        {&block_.eta, x.C * x.R},    {&block_.values, x.C * x.M},  {&block_.by_values, x.C * x.M}};
    int64_t total = 0;
    for (const auto& [pointer, count] : planes) total += count * kPlane;
    memory_ = at::empty({total}, at::kDouble);
    double* next = memory_.data_ptr<double>();
    for (const auto& [pointer, count] : planes) *pointer = std::exchange(next, next + count * kPlane);
  }

  void set(const Channel& channel) {
    block_.delta = channel.delta, block_.nu_mu = channel.nu_mu.data();
    block_.rho = channel.rho.data(), block_.alpha = channel.alpha.data();
  }
  void evaluate(const double* nodes) {
    block_.nodes = nodes;
    s4_cauchy().reciprocals(block_);
    std::fill_n(block_.sums, 2 * block_.K * kPlane, 0.0);
    row_products<double>().multiply_add({block_.nu_mu, block_.N}, {block_.reciprocals, kPlane},
                                        {block_.sums, kPlane}, 2 * block_.K, block_.N, kPlane);
    s4_cauchy().solve(block_);
  }
  void differentiate(CauchyGradient& gradient) const {
    s4_cauchy().differentiate_solve(block_, gradient);
    s4_cauchy().differentiate_sums(block_, gradient);
  }

  // Planes of row i * M + m.
  const double* values(int64_t row) const { return block_.values + row * kPlane; }
  double* by_values(int64_t row) const { return block_.by_values + row * kPlane; }

 private:
  CauchyBlock block_{};
  at::Tensor memory_;
};

// Calls body(channel, row, h) for the channels of a group.
template <class Body>
void for_each_channel(const Problem& problem, int64_t group, const Body& body) {
  const int64_t begin = group * problem.group(), end = std::min(begin + problem.group(), problem.H);
  for (int64_t h = begin; h < end; ++h) body(h - begin, h);
}

complex* spectrum_data(const at::Tensor& spectrum) {
  return reinterpret_cast<complex*>(spectrum.data_ptr<c10::complex<double>>());
}

// (group, C M, taps): what the channels' c gives at one circle of nodes.
at::Tensor circle_taps(const Problem& problem, const Nodes& nodes, const std::vector<Channel>& channels) {
  const int64_t rows = problem.C * problem.M;
  const auto spectrum = at::empty({int64_t(channels.size()), rows, nodes.bins}, at::kComplexDouble);
  complex* data = spectrum_data(spectrum);
  Resolvent resolvent(problem);
  for (const Channel& channel : channels) {
    resolvent.set(channel);
    for (int64_t first = 0; first < nodes.bins; first += kNodes) {
      resolvent.evaluate(nodes.block(first / kNodes));
      const int64_t count = std::min(kNodes, nodes.bins - first);
      for (int64_t row = 0; row < rows; ++row) {
        const double* values = resolvent.values(row);
        complex* target = data + row * nodes.bins + first;
        for (int64_t i = 0; i < count; ++i) target[i] = {values[i], values[kNodes + i]};
      }
    }
    data += rows * nodes.bins;
  }
  return at::fft_irfft(spectrum, nodes.count).contiguous();
}

template <class scalar_t>
void forward_group(const Problem& problem, int64_t group, scalar_t* k) {
  const int64_t M = problem.M, C = problem.C, period = problem.period;
  std::vector<Channel> channels;
  for_each_channel(problem, group, [&](int64_t, int64_t h) { channels.emplace_back(problem, h); });
  std::vector<at::Tensor> taps;
  for (const Nodes& nodes : problem.circles) taps.push_back(circle_taps(problem, nodes, channels));
  std::vector<double> row(problem.L);
  for_each_channel(problem, group, [&](int64_t index, int64_t h) {
    for (int64_t i = 0; i < C * M; ++i) {
      auto source = [&](size_t circle) {
        return taps[circle].const_data_ptr<double>() + (index * C * M + i) * problem.circles[circle].count;
      };
      std::copy_n(source(0), std::min(problem.L, period), row.begin());
      for (int64_t l = period; l < problem.L; ++l) {
        row[l] = row[l - period] - source(1)[l - period] * problem.circles[1].growth(l - period);
      }
      std::copy(row.begin(), row.end(), k + ((i % M * C + i / M) * problem.H + h) * problem.L);
    }
  });
}

// Gradients in float64; those of w, p and b are one row a channel, which copies of A then add up.
struct Gradients {
  Vector w, p, b, c;  // (H, N), (R, H, N), (M, H, N), (C, H, N)
  std::vector<double> log_dt;

  explicit Gradients(const Problem& x)
      : w(x.H * x.N), p(x.R * x.H * x.N), b(x.M * x.H * x.N), c(x.C * x.H * x.N), log_dt(x.H) {}
};

// Derivatives of sum(grad_k k) by one channel's Cauchy sums, and then by its parameters.
class ChannelGradient {
 public:
  ChannelGradient(const Problem& problem, const Channel& channel)
      : problem_(problem),
        channel_(channel),
        nu_mu_(channel.nu_mu.size()),
        rho_(problem.N),
        alpha_(problem.N),
        sums_{nu_mu_.data(), rho_.data(), alpha_.data(), 0, 0} {}

  // spectrum (C M, bins): the transform of the gradient of the taps.
  void add(Resolvent& resolvent, const Nodes& nodes, const complex* spectrum) {
    for (int64_t first = 0; first < nodes.bins; first += kNodes) {
      resolvent.evaluate(nodes.block(first / kNodes));
      const int64_t count = std::min(kNodes, nodes.bins - first);
      for (int64_t row = 0; row < problem_.C * problem_.M; ++row) {
        const complex* source = spectrum + row * nodes.bins + first;
        double* target = resolvent.by_values(row);
        std::fill_n(target, kPlane, 0.0);
        for (int64_t i = 0; i < count; ++i) {
          const double weight = nodes.weight(first + i);
          target[i] = weight * source[i].real(), target[kNodes + i] = -weight * source[i].imag();
        }
      }
      resolvent.differentiate(sums_);
    }
  }

  void write(int64_t h, Gradients& gradients) const {
    gradients.log_dt[h] = sums_.log_front + sums_.log_kappa;
    for (int64_t n = 0; n < problem_.N; ++n) write_state(h, n, gradients);
  }

 private:
  void write_state(int64_t h, int64_t n, Gradients& gradients) const {
    const int64_t N = problem_.N, R = problem_.R, M = problem_.M, C = problem_.C, H = problem_.H;
    const complex a = channel_.a[n];
    complex by_a = -2 * rho_[n] * -std::conj(a) - alpha_[n];
    auto row = [&](Vector& rows, int64_t i) -> complex& { return rows[(i * H + h) * N + n]; };
    for (int64_t i = 0; i < C + R; ++i) {
      for (int64_t j = 0; j < M + R; ++j) {
        const int64_t u = i * (M + R) + j, K = (C + R) * (M + R);
        const double by_nu = nu_mu_[u * N + n], by_mu = nu_mu_[(K + u) * N + n];
        const complex output = channel_.outputs[i * N + n], input = channel_.inputs[j * N + n];
        const complex by_output = 2.0 * (by_mu - by_nu * std::conj(a)) * input;
        const complex by_input = 2.0 * (by_mu - by_nu * std::conj(a)) * output;
        by_a -= 2.0 * by_nu * std::conj(output * input);
        if (i < C)
          row(gradients.c, i) += by_output;
        else
          row(gradients.p, i - C) += std::conj(by_output);
        if (j < M)
          row(gradients.b, j) += by_input;
        else
          row(gradients.p, j - M) += by_input;
      }
    }
    row(gradients.w, 0) = channel_.delta * by_a;
    gradients.log_dt[h] += (by_a * a).real();
  }

  const Problem& problem_;
  const Channel& channel_;
  std::vector<double> nu_mu_, rho_, alpha_;
  CauchyGradient sums_;
};

// grad (group, C, M, L), float64, which changes.
void backward_group(const Problem& problem, int64_t group, const at::Tensor& grad, Gradients& gradients) {
  const int64_t rows = problem.C * problem.M, period = problem.period;
  const auto flat = grad.flatten(0, 2);
  std::vector<at::Tensor> taps{flat.narrow(1, 0, problem.circles[0].taps)};
  if (problem.L > period) {
    taps.push_back(at::empty({flat.size(0), problem.L - period}, at::kDouble));
    for (int64_t i = 0; i < flat.size(0); ++i) {
      double *g = flat.data_ptr<double>() + i * problem.L,
             *later = taps[1].data_ptr<double>() + i * taps[1].size(1);
      for (int64_t l = problem.L - 1; l >= period; --l) {
        g[l - period] += g[l];
        later[l - period] = -g[l] * problem.circles[1].growth(l - period);
      }
    }
  }
  std::vector<at::Tensor> spectra;
  for (size_t i = 0; i < taps.size(); ++i)
    spectra.push_back(at::fft_rfft(taps[i], problem.circles[i].count).contiguous());
  Resolvent resolvent(problem);
  for_each_channel(problem, group, [&](int64_t index, int64_t h) {
    const Channel channel(problem, h);
    ChannelGradient gradient(problem, channel);
    resolvent.set(channel);
    for (size_t i = 0; i < spectra.size(); ++i) {
      const Nodes& nodes = problem.circles[i];
      gradient.add(resolvent, nodes, spectrum_data(spectra[i]) + index * rows * nodes.bins);
    }
    gradient.write(h, gradients);
  });
}

// rows (X, H, N) to pairs (X, S, N, 2), each the sum over its channels in order, conjugated as autograd
// stores the derivative by a complex number.
at::Tensor pairs(const Vector& rows, int64_t X, int64_t H, int64_t S, int64_t N) {
  const Complexes result(at::zeros({X, S, N, 2}, at::kDouble));
  for (int64_t row = 0; row < X * H; ++row) {
    complex* target = result.data + (row / H * S + row % H % S) * N;
    for (int64_t n = 0; n < N; ++n) target[n] += std::conj(rows[row * N + n]);
  }
  return result.tensor;
}

at::Tensor s4_kernel(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b, const at::Tensor& c,
                     const at::Tensor& log_dt, int64_t length, int64_t nodes, double rate) {
  s4_shapes::check_kernel(w, p, b, c, log_dt, length, nodes, rate);
  const Problem problem(w, p, b, c, log_dt, length, nodes, rate);
  auto k = at::empty({problem.M, problem.C, problem.H, length}, c.options());
  if (k.numel() == 0) return k;
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "s4_kernel", [&] {
    scalar_t* data = k.data_ptr<scalar_t>();
    parallel_for_each(problem.groups(), [&](int64_t group) { forward_group(problem, group, data); });
  });
  return k;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> s4_kernel_backward(
    const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
    const at::Tensor& c, const at::Tensor& log_dt, int64_t nodes, double rate,
    std::array<bool, 5> output_mask) {
  s4_shapes::check_kernel_backward(grad_k, w, p, b, c, log_dt, nodes, rate);
  const Problem problem(w, p, b, c, log_dt, grad_k.size(3), nodes, rate);
  Gradients gradients(problem);
  if (grad_k.numel() > 0) {
    parallel_for_each(problem.groups(), [&](int64_t group) {
      const int64_t begin = group * problem.group(), size = std::min(problem.group(), problem.H - begin);
      const auto part = grad_k.narrow(2, begin, size).permute({2, 1, 0, 3});
      const auto grad = at::empty(part.sizes(), at::kDouble);
      grad.copy_(part);
      backward_group(problem, group, grad, gradients);
    });
  }
  const int64_t S = problem.S, H = problem.H, N = problem.N;
  auto output = [&](bool wanted, const at::Tensor& gradient) {
    return wanted ? gradient.to(w.scalar_type()) : at::Tensor();
  };
  const auto log_dt_gradient = at::empty({H}, at::kDouble);
  std::copy(gradients.log_dt.begin(), gradients.log_dt.end(), log_dt_gradient.data_ptr<double>());
  return {output(output_mask[0], pairs(gradients.w, 1, H, S, N).squeeze(0)),
          output(output_mask[1], pairs(gradients.p, problem.R, H, S, N)),
          output(output_mask[2], pairs(gradients.b, problem.M, H, S, N)),
          output(output_mask[3], pairs(gradients.c, problem.C, H, H, N)),
          output(output_mask[4], log_dt_gradient)};
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("s4_kernel", s4_kernel);
  m.impl("s4_kernel_backward", s4_kernel_backward);
}

}  // namespace spade_ext::s4_cpu
