// The kernel through its values at roots of unity: at each, a Cauchy sum and Woodbury's formula. Equations:
// README.md. A task takes a channel, so nothing of size H N L is held.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/fft_irfft.h>
#include <ATen/ops/fft_rfft.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/s4/s4_extension.h>
#include <spade_ext/s4/s4_shapes.h>
#include <spade_ext/s4/s4_system.h>
#include <torch/library.h>

namespace spade_ext::s4_cpu {

struct Problem {
  Complexes w, p, b, c;
  Values<double> log_dt;
  double rate;
  int64_t S, R, N, M, C, H, L;
  int64_t truncation, extended;  // of c as it was given, and as `length` taps need it
  int64_t nodes;                 // roots of unity

  Problem(const at::Tensor& w_, const at::Tensor& p_, const at::Tensor& b_, const at::Tensor& c_,
          const at::Tensor& log_dt_, int64_t length, int64_t truncation_, double rate_)
      : w(w_), p(p_), b(b_), c(c_), log_dt(log_dt_), rate(rate_) {
    S = w_.size(0), R = p_.size(0), N = w_.size(1), M = b_.size(0), C = c_.size(0), H = c_.size(1);
    L = length, truncation = extended = truncation_;
    auto count = [&] { return std::llrint(double(extended) / rate); };
    while (count() < std::max<int64_t>(L, 1)) extended *= 2;
    nodes = count();
  }

  int64_t bins() const { return nodes / 2 + 1; }
  // dt/2 at rate 1, to which c belongs
  double natural_delta(int64_t h) const { return 0.5 * std::exp(log_dt.data[h]); }
  const complex* b_row(int64_t m, int64_t s) const { return b.data + (m * S + s) * N; }
  const complex* c_row(int64_t i, int64_t h) const { return c.data + (i * H + h) * N; }
  // What an entry of the spectrum weighs in the inverse transform: it stands for its conjugate too.
  double weight(int64_t bin) const { return (bin == 0 || 2 * bin == nodes ? 1.0 : 2.0) / double(nodes); }
};

// One channel's system over all states: those stored, then their conjugates.
struct Channel {
  int64_t N;  // of all states
  double natural_delta, delta;
  StateMatrix a;
  Extension extension;
  Vector w, inputs, outputs;  // (N); (M + R, N): b, p; (C + R, N): c, extended, and conj(p)

  Channel(const Problem& problem, int64_t h)
      : N(2 * problem.N),
        natural_delta(problem.natural_delta(h)),
        delta(natural_delta * problem.rate),
        a(problem.w, problem.p, h % problem.S),
        extension(a, natural_delta, problem.truncation, problem.extended) {
    append(w, a.w);
    for (int64_t m = 0; m < problem.M; ++m) append(inputs, problem.b_row(m, h % problem.S));
    for (int64_t i = 0; i < problem.C; ++i) append(outputs, extension.extend(problem.c_row(i, h)).data());
    for (int64_t r = 0; r < problem.R; ++r) {
      append(inputs, a.row(r));
      append(outputs, a.transposed().row(r));
    }
  }
  const complex* input(int64_t j) const { return inputs.data() + j * N; }
  const complex* output(int64_t i) const { return outputs.data() + i * N; }

 private:
  void append(Vector& rows, const complex* row) const {
    rows.insert(rows.end(), row, row + a.N);
    for (int64_t n = 0; n < a.N; ++n) rows.push_back(std::conj(row[n]));
  }
};

inline complex dot(const complex* x, const complex* y, int64_t N) {
  double real = 0, imag = 0;
#pragma omp simd reduction(+ : real, imag)
  for (int64_t n = 0; n < N; ++n) {
    real += x[n].real() * y[n].real() - x[n].imag() * y[n].imag();
    imag += x[n].real() * y[n].imag() + x[n].imag() * y[n].real();
  }
  return {real, imag};
}

// (i sine - cosine dt/2 A)^-1 between a channel's inputs b and outputs c, at half the angle of a root of
// unity.
class Resolvent {
 public:
  double kappa = 0;        // cosine dt/2
  Vector q;                // (N): the diagonal part
  Vector values, xi, eta;  // (C, M): c . resolvent . b; (R, M): p^* resolvent b; (C, R): c . resolvent . p

  Resolvent(const Problem& problem, const Channel& channel)
      : q(channel.N),
        values(problem.C * problem.M),
        xi(problem.R * problem.M),
        eta(problem.C * problem.R),
        channel_(channel),
        R_(problem.R),
        M_(problem.M),
        C_(problem.C),
        scaled_(channel.N),
        sums_((C_ + R_) * (M_ + R_)),
        matrix_(R_ * R_),
        transposed_(R_ * R_),
        eta_columns_(R_ * C_) {}

  void evaluate(double sine, double cosine) {
    const int64_t N = channel_.N;
    kappa = cosine * channel_.delta;
    for (int64_t n = 0; n < N; ++n) {
      const complex denominator = complex(0, sine) - kappa * channel_.w[n];
      q[n] = std::conj(denominator) * (1 / std::norm(denominator));
    }
    for (int64_t i = 0; i < C_ + R_; ++i) {
      for (int64_t n = 0; n < N; ++n) scaled_[n] = channel_.output(i)[n] * q[n];
      for (int64_t j = 0; j < M_ + R_; ++j)
        sums_[i * (M_ + R_) + j] = dot(scaled_.data(), channel_.input(j), N);
    }
    for (int64_t r = 0; r < R_; ++r) {
      for (int64_t k = 0; k < R_; ++k) {
        matrix_[r * R_ + k] = transposed_[k * R_ + r] = double(r == k) + kappa * sum(C_ + r, M_ + k);
      }
      for (int64_t m = 0; m < M_; ++m) xi[r * M_ + m] = sum(C_ + r, m);
      for (int64_t i = 0; i < C_; ++i) eta_columns_[r * C_ + i] = sum(i, M_ + r);
    }
    solve(R_, matrix_.data(), xi.data(), M_);
    solve(R_, transposed_.data(), eta_columns_.data(), C_);
    for (int64_t i = 0; i < C_; ++i) {
      for (int64_t r = 0; r < R_; ++r) eta[i * R_ + r] = eta_columns_[r * C_ + i];
      for (int64_t m = 0; m < M_; ++m) {
        complex value = sum(i, m);
        for (int64_t r = 0; r < R_; ++r) value -= kappa * sum(i, M_ + r) * xi[r * M_ + m];
        values[i * M_ + m] = value;
      }
    }
  }

 private:
  complex sum(int64_t i, int64_t j) const { return sums_[i * (M_ + R_) + j]; }

  const Channel& channel_;
  int64_t R_, M_, C_;
  Vector scaled_, sums_, matrix_, transposed_, eta_columns_;
};

// Calls body(bin, sine, cosine, front) for each root of unity; k_hat = front * values.
template <class Body>
void for_each_bin(const Problem& problem, double delta, const Body& body) {
  for (int64_t bin = 0; bin < problem.bins(); ++bin) {
    const double half_angle = M_PI * double(bin) / double(problem.nodes);
    const double sine = std::sin(half_angle), cosine = std::cos(half_angle);
    body(bin, sine, cosine, delta * complex(cosine, sine));
  }
}

complex* spectrum_data(const at::Tensor& spectrum) {
  return reinterpret_cast<complex*>(spectrum.data_ptr<c10::complex<double>>());
}

template <class scalar_t>
void forward_channel(const Problem& problem, int64_t h, scalar_t* k) {
  const int64_t M = problem.M, C = problem.C, bins = problem.bins();
  const Channel channel(problem, h);
  Resolvent resolvent(problem, channel);
  const auto spectrum = at::empty({M, C, bins}, at::kComplexDouble);
  complex* data = spectrum_data(spectrum);
  for_each_bin(problem, channel.delta, [&](int64_t bin, double sine, double cosine, complex front) {
    resolvent.evaluate(sine, cosine);
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t m = 0; m < M; ++m) data[(m * C + i) * bins + bin] = front * resolvent.values[i * M + m];
    }
  });
  const auto kernel = at::fft_irfft(spectrum, problem.nodes).contiguous();
  for (int64_t row = 0; row < M * C; ++row) {
    const double* source = kernel.const_data_ptr<double>() + row * problem.nodes;
    std::copy_n(source, problem.L, k + (row * problem.H + h) * problem.L);
  }
}

// Derivatives of sum(grad_k k) by one channel's parameters, over all states. A complex z holds what dz
// multiplies: d = Re(z_ dz).
class ChannelGradient {
 public:
  Vector a, p, b, c;            // (N) by dt/2 w; (R, N), (M, N), (C, N)
  double kappa = 0, front = 0;  // by the logarithms of the two

  ChannelGradient(const Problem& problem, const Channel& channel)
      : a(channel.N),
        p(problem.R * channel.N),
        b(problem.M * channel.N),
        c(problem.C * channel.N),
        channel_(channel),
        R_(problem.R),
        M_(problem.M),
        C_(problem.C),
        x_(M_),
        y_(C_),
        weighted_x_(C_),
        weighted_y_(M_) {}

  // Adds one root's part, gamma (C, M) being what the values multiply.
  void add(const Resolvent& at, double cosine, const Vector& gamma) {
    for (int64_t i = 0; i < C_; ++i) {
      for (int64_t m = 0; m < M_; ++m) {
        complex low_rank = 0;
        for (int64_t r = 0; r < R_; ++r) low_rank += at.eta[i * R_ + r] * at.xi[r * M_ + m];
        front += (gamma[i * M_ + m] * at.values[i * M_ + m]).real();
        kappa -= at.kappa * (gamma[i * M_ + m] * low_rank).real();
      }
    }
    for (int64_t n = 0; n < channel_.N; ++n) add_state(at, cosine, gamma, n);
  }

  // To the stored states (X, N / 2) of rows (X, N): d = Re(z_ dz + z'_ dconj(z)).
  Vector stored(const Vector& rows) const {
    const int64_t N = channel_.N / 2;
    Vector result(rows.size() / 2);
    for (int64_t i = 0; i < int64_t(result.size()); ++i) {
      const int64_t row = i / N, n = i % N;
      result[i] = rows[2 * row * N + n] + std::conj(rows[(2 * row + 1) * N + n]);
    }
    return result;
  }

 private:
  void add_state(const Resolvent& at, double cosine, const Vector& gamma, int64_t n) {
    const int64_t N = channel_.N;
    for (int64_t m = 0; m < M_; ++m) {  // x = resolvent b
      complex sum = 0;
      for (int64_t r = 0; r < R_; ++r) sum += channel_.input(M_ + r)[n] * at.xi[r * M_ + m];
      x_[m] = at.q[n] * (channel_.input(m)[n] - at.kappa * sum);
    }
    for (int64_t i = 0; i < C_; ++i) {  // y = c resolvent
      complex sum = 0;
      for (int64_t r = 0; r < R_; ++r) sum += channel_.output(C_ + r)[n] * at.eta[i * R_ + r];
      y_[i] = at.q[n] * (channel_.output(i)[n] - at.kappa * sum);
    }
    for (int64_t i = 0; i < C_; ++i) {
      weighted_x_[i] = 0;
      for (int64_t m = 0; m < M_; ++m) weighted_x_[i] += gamma[i * M_ + m] * x_[m];
      c[i * N + n] += weighted_x_[i];
      a[n] += cosine * (y_[i] * weighted_x_[i]);
    }
    for (int64_t m = 0; m < M_; ++m) {
      weighted_y_[m] = 0;
      for (int64_t i = 0; i < C_; ++i) weighted_y_[m] += gamma[i * M_ + m] * y_[i];
      b[m * N + n] += weighted_y_[m];
    }
    for (int64_t r = 0; r < R_; ++r) {
      complex by_p = 0, by_conj = 0;
      for (int64_t m = 0; m < M_; ++m) by_p += at.xi[r * M_ + m] * weighted_y_[m];
      for (int64_t i = 0; i < C_; ++i) by_conj += at.eta[i * R_ + r] * weighted_x_[i];
      p[r * N + n] -= at.kappa * (by_p + std::conj(by_conj));
    }
  }

  const Channel& channel_;
  int64_t R_, M_, C_;
  Vector x_, y_, weighted_x_, weighted_y_;
};

// Gradients in float64; those of w, p and b are one row a channel, which copies of A then add up.
struct Gradients {
  Vector w, p, b, c;  // (H, N), (R, H, N), (M, H, N), (C, H, N)
  std::vector<double> log_dt;

  explicit Gradients(const Problem& x)
      : w(x.H * x.N), p(x.R * x.H * x.N), b(x.M * x.H * x.N), c(x.C * x.H * x.N), log_dt(x.H) {}
};

// spectrum (M, C, bins): the transform of grad_k's rows of channel h.
void backward_channel(const Problem& problem, int64_t h, const complex* spectrum, Gradients& gradients) {
  const int64_t R = problem.R, N = problem.N, M = problem.M, C = problem.C, H = problem.H;
  const Channel channel(problem, h);
  Resolvent resolvent(problem, channel);
  ChannelGradient grad(problem, channel);
  Vector gamma(C * M);
  for_each_bin(problem, channel.delta, [&](int64_t bin, double sine, double cosine, complex front) {
    resolvent.evaluate(sine, cosine);
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t m = 0; m < M; ++m) {
        const complex g = spectrum[(m * C + i) * problem.bins() + bin];
        gamma[i * M + m] = problem.weight(bin) * std::conj(g) * front;
      }
    }
    grad.add(resolvent, cosine, gamma);
  });

  const Vector a = grad.stored(grad.a), p = grad.stored(grad.p), b = grad.stored(grad.b);
  Vector c = grad.stored(grad.c);
  StateGradient state(channel.a);  // through the extension of c
  for (int64_t i = 0; i < C; ++i) {
    channel.extension.backward(problem.c_row(i, h), c.data() + i * N, state);
  }
  gradients.log_dt[h] = grad.front + grad.kappa + channel.natural_delta * state.delta;
  for (int64_t n = 0; n < N; ++n) {
    const complex by_w = channel.delta * a[n] + channel.natural_delta * state.a[n];
    gradients.w[h * N + n] = by_w;
    gradients.log_dt[h] += (by_w * channel.a.w[n]).real();
    for (int64_t r = 0; r < R; ++r) gradients.p[(r * H + h) * N + n] = p[r * N + n] + state.p[r * N + n];
    for (int64_t m = 0; m < M; ++m) gradients.b[(m * H + h) * N + n] = b[m * N + n];
    for (int64_t i = 0; i < C; ++i) gradients.c[(i * H + h) * N + n] = c[i * N + n];
  }
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
    parallel_for_each(problem.H, [&](int64_t h) { forward_channel(problem, h, data); });
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
    parallel_for_each(problem.H, [&](int64_t h) {
      const auto spectrum = at::fft_rfft(grad_k.select(2, h).to(at::kDouble), problem.nodes).contiguous();
      backward_channel(problem, h, spectrum_data(spectrum), gradients);
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
