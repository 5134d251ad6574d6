// The recurrence: s4_state over a sequence, s4_step over one token.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <spade_ext/core/parallel.h>
#include <spade_ext/s4/s4_shapes.h>
#include <spade_ext/s4/s4_system.h>
#include <torch/library.h>

namespace spade_ext::s4_cpu {

at::Tensor s4_state(const at::Tensor& u, const at::Tensor& w_, const at::Tensor& p_, const at::Tensor& b_,
                    const at::Tensor& log_dt_, const OptionalTensor& state) {
  s4_shapes::check_state(u, w_, p_, b_, log_dt_, state);
  const Complexes w(w_), p(p_), b(b_);
  const Values<double> log_dt(log_dt_);
  const int64_t B = u.size(0), H = u.size(1), L = u.size(2), S = w_.size(0), N = w_.size(1);
  const Complexes states(is_given(state) ? state->to(at::kDouble).contiguous().clone()
                                         : at::zeros({B, H, N, 2}, at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "s4_state", [&] {
    const scalar_t* inputs = u.const_data_ptr<scalar_t>();
    parallel_for_each(B * H, [&](int64_t row) {
      const int64_t batch = row / H, h = row % H, s = h % S;
      BilinearStep system(StateMatrix(w, p, s), 0.5 * std::exp(log_dt.data[h]));
      const scalar_t* input = inputs + batch * u.stride(0) + h * u.stride(1);
      complex* x = states.data + row * N;
      for (int64_t l = 0; l < L; ++l) {
        if (l % kFlushEvery == 0) flush(x, N);
        system.step(x, b.data + s * N, double(input[l * u.stride(2)]));
      }
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
