// The recurrence x_t = abar x_{t-1} + bbar u_t, all n of a channel side by side in float64. A task is a
// channel. The backward keeps a row's states at the starts of blocks and computes those of one block again.
#include <spade_ext/diagonal/diagonal_cpu.h>
#include <torch/library.h>

#include <vector>

namespace spade_ext::diagonal_cpu {

constexpr int64_t kBlock = kFlushEvery;  // tokens

template <class T>
struct ScanProblem : System<T> {
  int64_t B, C, H, L;
  Values<T> b, c;  // (S, N), (C, H, N)

  // u (B, H, L)
  ScanProblem(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b_, const at::Tensor& c_,
              const OptionalTensor& log_dt, OptionalString disc)
      : System<T>(w, log_dt, diagonal_shapes::parse_disc("diagonal_scan", disc, true)),
        B(u.size(0)),
        C(c_.size(0)),
        H(u.size(1)),
        L(u.size(2)),
        b(b_),
        c(c_) {}

  // A complex state stands for itself and its conjugate.
  static constexpr double factor = std::is_same_v<T, double> ? 1.0 : 2.0;
};

template <class T>
void load(Lanes<T>& z, const T* row) {
  for (int64_t n = 0; n < z.N; ++n) z.set(n, row[n]);
}

template <class T>
void store(const Lanes<T>& z, T* row) {
  for (int64_t n = 0; n < z.N; ++n) row[n] = z.get(n);
}

template <class T>
void conjugate(Lanes<T>& z) {
  for (int64_t n = 0; n < z.N; ++n) z.set(n, conj(z.get(n)));
}

// One channel's recurrence; y_c = Re sum_n c[c] x.
template <class T>
struct Channel {
  Lanes<T> abar, bbar;
  std::vector<Lanes<T>> c;

  Channel(const ScanProblem<T>& p, int64_t h) : abar(p.N), bbar(p.N) {
    for (int64_t n = 0; n < p.N; ++n) {
      const auto d = p.discrete(h, n);
      abar.set(n, d.abar);
      bbar.set(n, d.scale * p.b.data[(h % p.S) * p.N + n]);
    }
    for (int64_t i = 0; i < p.C; ++i) {
      c.emplace_back(p.N);
      for (int64_t n = 0; n < p.N; ++n) c[i].set(n, p.factor * p.c.data[(i * p.H + h) * p.N + n]);
    }
  }

  void advance(Lanes<T>& x, double u) const {
    multiply(x, abar);
    add_scaled(x, u, bbar);
  }
};

// Writes y (B, C, H, L) of channel h and moves its states (B, H, N) from before the first token to after the
// last.
template <class T, class scalar_t>
void scan_channel(const ScanProblem<T>& p, int64_t h, at::TensorAccessor<const scalar_t, 3> u, T* state,
                  at::TensorAccessor<scalar_t, 4> y) {
  const Channel<T> channel(p, h);
  Lanes<T> x(p.N);
  for (int64_t b = 0; b < p.B; ++b) {
    T* const row = state + (b * p.H + h) * p.N;
    load(x, row);
    for (int64_t t = 0; t < p.L; ++t) {
      if (t % kBlock == 0) x.flush();
      channel.advance(x, u[b][h][t]);
      for (int64_t c = 0; c < p.C; ++c) y[b][c][h][t] = static_cast<scalar_t>(dot(channel.c[c], x));
    }
    store(x, row);
  }
}

// x at the start of each block.
template <class T, class scalar_t>
std::vector<Lanes<T>> block_starts(const Channel<T>& channel, const T* state,
                                   at::TensorAccessor<const scalar_t, 1> u) {
  Lanes<T> x(channel.abar.N);
  load(x, state);
  std::vector<Lanes<T>> starts;
  for (int64_t t = 0; t < u.size(0); ++t) {
    if (t % kBlock == 0) {
      x.flush();
      starts.emplace_back(x.N).copy(x);
    }
    channel.advance(x, u[t]);
  }
  return starts;
}

// What one channel adds up over the batch and the tokens: the derivatives by abar, bbar and Channel::c.
template <class T>
struct ChannelSums {
  Lanes<T> by_abar, by_bbar;
  std::vector<Lanes<T>> by_c;

  ChannelSums(int64_t N, int64_t C) : by_abar(N, 0), by_bbar(N, 0) {
    for (int64_t c = 0; c < C; ++c) by_c.emplace_back(N, 0);
  }
};

// Writes grad_u of channel h and turns its rows of grad_state from the gradient of the final state into that
// of the initial one. lambda is the derivative by x_t: dL = Re(lambda dx_t).
template <class T, class scalar_t>
ChannelSums<T> backward_sweep(const ScanProblem<T>& p, int64_t h,
                              at::TensorAccessor<const scalar_t, 4> grad_y,
                              at::TensorAccessor<const scalar_t, 3> u, const T* state, T* grad_state,
                              at::TensorAccessor<scalar_t, 3> grad_u) {
  const Channel<T> channel(p, h);
  ChannelSums<T> sums(p.N, p.C);
  Lanes<T> lambda(p.N);
  std::vector<Lanes<T>> x;  // of one block: entry i is the state before its token i
  for (int64_t i = 0; i <= kBlock; ++i) x.emplace_back(p.N);

  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t row = (b * p.H + h) * p.N;
    auto starts = block_starts<T, scalar_t>(channel, state + row, u[b][h]);
    load(lambda, grad_state + row);
    conjugate(lambda);
    for (int64_t block = int64_t(starts.size()) - 1; block >= 0; --block) {
      const int64_t begin = block * kBlock, size = std::min(kBlock, p.L - begin);
      x[0].copy(starts[block]);
      for (int64_t i = 0; i < size; ++i) {
        x[i + 1].copy(x[i]);
        channel.advance(x[i + 1], u[b][h][begin + i]);
      }
      lambda.flush();
      for (int64_t i = size - 1; i >= 0; --i) {
        const int64_t t = begin + i;
        for (int64_t c = 0; c < p.C; ++c) {
          const double g = grad_y[b][c][h][t];
          add_scaled(lambda, g, channel.c[c]);
          add_scaled(sums.by_c[c], g, x[i + 1]);
        }
        grad_u[b][h][t] = static_cast<scalar_t>(dot(channel.bbar, lambda));
        add_scaled(sums.by_bbar, u[b][h][t], lambda);
        add_product(sums.by_abar, lambda, x[i]);
        multiply(lambda, channel.abar);
      }
    }
    conjugate(lambda);
    store(lambda, grad_state + row);
  }
  return sums;
}

// The gradients of the parameters in float64: rows of w and b for each channel, to be added over the copies.
template <class T>
struct ParameterGradients {
  Values<T> w, b, c;      // (H, N), (H, N), (C, H, N)
  Values<double> log_dt;  // (H,)

  explicit ParameterGradients(const ScanProblem<T>& p)
      : w(Values<T>::zeros(p.H, p.N)),
        b(Values<T>::zeros(p.H, p.N)),
        c(at::zeros(p.c.tensor.sizes(), at::kDouble)),
        log_dt(at::zeros({p.H}, at::kDouble)) {}

  // The complex derivative of a real function is stored conjugated, as autograd does.
  void set(const ScanProblem<T>& p, int64_t h, const ChannelSums<T>& sums) {
    double by_dt = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      const auto d = p.discrete(h, n);
      const T by_abar = sums.by_abar.get(n), by_bbar = sums.by_bbar.get(n);
      const T by_scale = p.b.data[(h % p.S) * p.N + n] * by_bbar;
      w.data[h * p.N + n] = conj(d.abar_w * by_abar + d.scale_w * by_scale);
      b.data[h * p.N + n] = conj(d.scale * by_bbar);
      for (int64_t i = 0; i < p.C; ++i) {
        c.data[(i * p.H + h) * p.N + n] = conj(p.factor * sums.by_c[i].get(n));
      }
      by_dt += real(d.abar_dt * by_abar + d.scale_dt * by_scale);
    }
    log_dt.data[h] = p.dt(h) * by_dt;
  }
};

// A fresh float64 copy, zeros where there is no state.
at::Tensor working_state(const at::Tensor& u, const at::Tensor& w, const OptionalTensor& state) {
  if (is_given(state)) return state->to(at::kDouble, false, true, at::MemoryFormat::Contiguous);
  return at::zeros(C10_AS_INTARRAYREF_SLOW(diagonal_shapes::state_sizes(u, w)), at::kDouble);
}

// y (B, C, H, L) from u (B, H, L); `state`, float64 and contiguous, becomes the one after the last token.
void scan(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
          const OptionalTensor& log_dt, OptionalString disc, const at::Tensor& state, const at::Tensor& y) {
  dispatch(w, [&]<class T, class scalar_t>() {
    const ScanProblem<T> p(u, w, b, c, log_dt, disc);
    const Values<T> states(state);
    const auto u_ = u.accessor<const scalar_t, 3>();
    const auto y_ = y.accessor<scalar_t, 4>();
    parallel_for_each(p.H, [&](int64_t h) { scan_channel<T, scalar_t>(p, h, u_, states.data, y_); });
  });
}

std::tuple<at::Tensor, at::Tensor> diagonal_scan(const at::Tensor& u, const at::Tensor& w,
                                                 const at::Tensor& b, const at::Tensor& c,
                                                 const OptionalTensor& log_dt, const OptionalTensor& state,
                                                 OptionalString disc) {
  diagonal_shapes::check_scan(u, w, b, c, log_dt, state, disc);
  const auto y = empty_outputs(u, c.size(0)), final_state = working_state(u, w, state);
  scan(u, w, b, c, log_dt, disc, final_state, y);
  return {y, final_state.to(u.scalar_type())};
}

at::Tensor diagonal_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                         const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
  diagonal_shapes::check_step(u, w, b, c, log_dt, state, disc);
  const auto y = at::empty({u.size(0), c.size(0), u.size(1)}, u.options());
  const auto next_state = working_state(u, w, state);
  scan(u.unsqueeze(-1), w, b, c, log_dt, disc, next_state, y.unsqueeze(-1));
  state.copy_(next_state);
  return y;
}

using ScanGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ScanGrads diagonal_scan_backward(const at::Tensor& grad_y, const at::Tensor& grad_state, const at::Tensor& u,
                                 const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                                 const OptionalTensor& log_dt, const OptionalTensor& state,
                                 OptionalString disc, std::array<bool, 6> output_mask) {
  diagonal_shapes::check_scan_backward(grad_y, grad_state, u, w, b, c, log_dt, state, disc, output_mask);
  const auto grad_u = empty_signal(u);
  const auto initial = working_state(u, w, state), grad_initial = working_state(u, w, grad_state);
  return dispatch(w, [&]<class T, class scalar_t>() -> ScanGrads {
    const ScanProblem<T> p(u, w, b, c, log_dt, disc);
    const Values<T> states(initial), grad_states(grad_initial);
    ParameterGradients<T> gradients(p);
    const auto grad_y_ = grad_y.accessor<const scalar_t, 4>();
    const auto u_ = u.accessor<const scalar_t, 3>();
    const auto grad_u_ = grad_u.accessor<scalar_t, 3>();
    parallel_for_each(p.H, [&](int64_t h) {
      gradients.set(p, h,
                    backward_sweep<T, scalar_t>(p, h, grad_y_, u_, states.data, grad_states.data, grad_u_));
    });
    return {output_mask[0] ? grad_u : at::Tensor(),
            gradient(output_mask[1], p.sum_over_channels(gradients.w, p.H), w),
            gradient(output_mask[2], p.sum_over_channels(gradients.b, p.H), w),
            gradient(output_mask[3], gradients.c.tensor, w),
            gradient(output_mask[4], gradients.log_dt.tensor, w),
            gradient(output_mask[5], grad_initial, w)};
  });
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("diagonal_scan", diagonal_scan);
  m.impl("diagonal_scan_backward", diagonal_scan_backward);
  m.impl("diagonal_step", diagonal_step);
}

}  // namespace spade_ext::diagonal_cpu
