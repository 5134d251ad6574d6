// The recurrence: s4_state over a sequence, in vectors of channels, and s4_step over one token.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/s4/s4_shapes.h>
#include <spade_ext/s4/s4_state_steps.h>
#include <spade_ext/s4/s4_system.h>
#include <torch/library.h>

namespace spade_ext {
SPADE_EXT_LEVELS(S4StateSteps, s4_state_steps)
}  // namespace spade_ext

namespace spade_ext::s4_cpu {

// The steps of a vector of neighbouring channels, and states of some rows of the batch.
class StateVector {
 public:
  StateVector(const Complexes& w, const Complexes& p, const Complexes& b, const Values<double>& log_dt,
              int64_t first, int64_t batch)
      : table_(s4_state_steps()),
        N_(w.tensor.size(1)),
        R_(p.tensor.size(0)),
        first_(first),
        count_(std::min(table_.lanes, log_dt.tensor.size(0) - first)),
        batch_(batch),
        memory_(
            at::zeros({((2 + 2 * R_ + batch) * 2 * N_ + (kFlushEvery + R_) * batch + 4 * R_) * table_.lanes},
                      at::kDouble)) {
    double* next = memory_.data_ptr<double>();
    auto take = [&](int64_t vectors) { return std::exchange(next, next + vectors * table_.lanes); };
    steps_ = {N_, R_, take(2 * N_), take(2 * N_), take(R_ * 2 * N_), take(R_ * 2 * N_), take(R_)};
    x_ = take(batch * 2 * N_), u_ = take(batch * kFlushEvery), kappa_ = take(4 * R_);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t s = (first + i) % w.tensor.size(0);
      set_channel(i, StateMatrix(w, p, s), b.data + s * N_, 0.5 * std::exp(log_dt.data[first + i]));
    }
  }

  // Moves states (batch, H, N) over all tokens of u (batch, H, L).
  template <class scalar_t>
  void run(at::TensorAccessor<const scalar_t, 3> u, int64_t first_row, complex* states) {
    const int64_t H = u.size(1), L = u.size(2), lanes = table_.lanes;
    auto each_state = [&](auto body) {
      for (int64_t b = 0; b < batch_; ++b) {
        for (int64_t i = 0; i < count_; ++i) {
          complex* const state = states + ((first_row + b) * H + first_ + i) * N_;
          for (int64_t n = 0; n < N_; ++n)
            body(state[n], x_[(b * 2 * N_ + n) * lanes + i], x_[((b * 2 + 1) * N_ + n) * lanes + i]);
        }
      }
    };
    each_state([](const complex& state, double& re, double& im) { re = state.real(), im = state.imag(); });
    for (int64_t begin = 0; begin < L; begin += kFlushEvery) {
      const int64_t tokens = std::min(kFlushEvery, L - begin);
      for (int64_t b = 0; b < batch_; ++b) {
        const auto row = u[first_row + b];
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t i = 0; i < count_; ++i) u_[(b * tokens + t) * lanes + i] = row[first_ + i][begin + t];
        }
      }
      flush(x_, batch_ * 2 * N_ * lanes);
      table_.run(steps_, batch_, tokens, u_, x_, kappa_);
    }
    each_state([](complex& state, double re, double im) { state = {re, im}; });
  }

 private:
  void set_channel(int64_t i, const StateMatrix& a, const complex* b, double delta) {
    const int64_t lanes = table_.lanes;
    std::vector<double> rows(R_ * 2 * N_), capacitance(R_ * R_);
    auto set = [&](double* target, int64_t n, complex value) {
      target[n * lanes + i] = value.real(), target[(N_ + n) * lanes + i] = value.imag();
    };
    Vector inverse(N_), solved(N_);
    for (int64_t n = 0; n < N_; ++n) {
      inverse[n] = 1.0 / (1.0 - delta * a.w[n]);
      set(steps_.decay, n, 2.0 * inverse[n] - 1.0);
      set(steps_.input, n, 2.0 * delta * inverse[n] * b[n]);
    }
    for (int64_t r = 0; r < R_; ++r) {
      for (int64_t n = 0; n < N_; ++n) {
        solved[n] = inverse[n] * a.row(r)[n];
        set(steps_.columns + r * 2 * N_ * lanes, n, 2 * delta * solved[n]);
        const complex row = 2.0 * std::conj(a.row(r)[n]) * inverse[n];
        rows[r * 2 * N_ + n] = row.real(), rows[(r * 2 + 1) * N_ + n] = -row.imag();
      }
      for (int64_t q = 0; q < R_; ++q)
        capacitance[q * R_ + r] = (q == r) + delta * project(a.row(q), solved.data(), N_);
    }
    solve(R_, capacitance.data(), rows.data(), 2 * N_);
    for (int64_t r = 0; r < R_; ++r) {
      double feed = 0;
      for (int64_t n = 0; n < N_; ++n) {
        const double re = rows[r * 2 * N_ + n], im = rows[(r * 2 + 1) * N_ + n];
        set(steps_.rows + r * 2 * N_ * lanes, n, {re, im});
        feed += delta * (re * b[n].real() + im * b[n].imag());
      }
      steps_.feed[r * lanes + i] = feed;
    }
  }

  const S4StateSteps& table_;
  int64_t N_, R_, first_, count_, batch_;
  at::Tensor memory_;
  S4Steps steps_;
  double *x_, *u_, *kappa_;
};

at::Tensor s4_state(const at::Tensor& u, const at::Tensor& w_, const at::Tensor& p_, const at::Tensor& b_,
                    const at::Tensor& log_dt_, const OptionalTensor& state) {
  constexpr int64_t kRows = 8;  // of the batch, in a task
  s4_shapes::check_state(u, w_, p_, b_, log_dt_, state);
  const Complexes w(w_), p(p_), b(b_);
  const Values<double> log_dt(log_dt_);
  const int64_t B = u.size(0), H = u.size(1), N = w_.size(1), lanes = s4_state_steps().lanes;
  const int64_t vectors = (H + lanes - 1) / lanes, parts = (B + kRows - 1) / kRows;
  const Complexes states(is_given(state) ? state->to(at::kDouble).contiguous().clone()
                                         : at::zeros({B, H, N, 2}, at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "s4_state", [&] {
    const auto inputs = u.accessor<const scalar_t, 3>();
    parallel_for_each(vectors * parts, [&](int64_t task) {
      const int64_t row = task % parts * kRows;
      StateVector vector(w, p, b, log_dt, task / parts * lanes, std::min(kRows, B - row));
      vector.run(inputs, row, states.data);
    });
  });
  return states.tensor.to(w_.scalar_type());
}

at::Tensor s4_step(const at::Tensor& u, const at::Tensor& w_, const at::Tensor& p_, const at::Tensor& b_,
                   const at::Tensor& c_, const at::Tensor& log_dt_, const at::Tensor& state) {
  s4_shapes::check_step(u, w_, p_, b_, c_, log_dt_, state);
  const Complexes w(w_), p(p_), b(b_), c(c_), x(state);
  const Values<double> log_dt(log_dt_), input(u);
  const int64_t B = u.size(0), H = u.size(1), S = w_.size(0), N = w_.size(1), C = c_.size(0);
  auto y = at::empty({B, C, H}, u.options().dtype(at::kDouble));
  double* outputs = y.data_ptr<double>();
  parallel_for_each(H, [&](int64_t h) {
    const int64_t s = h % S;
    BilinearStep system(StateMatrix(w, p, s), 0.5 * std::exp(log_dt.data[h]));
    for (int64_t row = 0; row < B; ++row) {
      complex* values = x.data + (row * H + h) * N;
      flush(values, N);
      system.step(values, b.data + s * N, input.data[row * H + h]);
      for (int64_t i = 0; i < C; ++i) {
        const complex* weights = c.data + (i * H + h) * N;
        double sum = 0;
        for (int64_t n = 0; n < N; ++n)
          sum += weights[n].real() * values[n].real() - weights[n].imag() * values[n].imag();
        outputs[(row * C + i) * H + h] = 2 * sum;
      }
    }
  });
  if (!x.tensor.is_same(state)) state.copy_(x.tensor);
  return y.to(u.scalar_type());
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("s4_state", s4_state);
  m.impl("s4_step", s4_step);
}

}  // namespace spade_ext::s4_cpu
