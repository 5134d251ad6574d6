// Compiled once a level (core/cpu_levels.h).
#include <ATen/cpu/vec/vec.h>
#include <spade_ext/s4/s4_state_steps.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using at::vec::fmadd;
using Vec = at::vec::Vectorized<double>;
constexpr int64_t W = Vec::size();

// kappa_r of `batch` states, each `size` numbers after the one before
template <int batch>
void project(const S4Steps& steps, const double* const* u, const double* x, double* kappa) {
  const int64_t size = 2 * steps.N * W;
  for (int64_t r = 0; r < steps.R; ++r) {
    const double* const row = steps.rows + r * size;
    const Vec feed = Vec::loadu(steps.feed + r * W);
    Vec sums[batch][2];
    for (int b = 0; b < batch; ++b) sums[b][0] = feed * Vec::loadu(u[b]), sums[b][1] = Vec(0);
    for (int64_t i = 0; i < size; i += 2 * W) {
      const Vec first = Vec::loadu(row + i), second = Vec::loadu(row + i + W);
      for (int b = 0; b < batch; ++b) {
        sums[b][0] = fmadd(first, Vec::loadu(x + b * size + i), sums[b][0]);
        sums[b][1] = fmadd(second, Vec::loadu(x + b * size + i + W), sums[b][1]);
      }
    }
    for (int b = 0; b < batch; ++b) (sums[b][0] + sums[b][1]).neg().store(kappa + (r * batch + b) * W);
  }
}

// From minus kappa, which `project` has left.
template <int batch>
void update(const S4Steps& steps, const double* const* u, double* x, const double* kappa) {
  const int64_t half = steps.N * W, size = 2 * half;
  Vec inputs[batch];
  for (int b = 0; b < batch; ++b) inputs[b] = Vec::loadu(u[b]);
  for (int64_t i = 0; i < half; i += W) {
    const Vec decay_re = Vec::loadu(steps.decay + i), decay_im = Vec::loadu(steps.decay + half + i);
    const Vec input_re = Vec::loadu(steps.input + i), input_im = Vec::loadu(steps.input + half + i);
    const Vec minus_decay_im = decay_im.neg();
    Vec re[batch], im[batch];
    for (int b = 0; b < batch; ++b) {
      const Vec x_re = Vec::loadu(x + b * size + i), x_im = Vec::loadu(x + b * size + half + i);
      re[b] = fmadd(decay_re, x_re, fmadd(minus_decay_im, x_im, input_re * inputs[b]));
      im[b] = fmadd(decay_re, x_im, fmadd(decay_im, x_re, input_im * inputs[b]));
    }
    for (int64_t r = 0; r < steps.R; ++r) {
      const Vec column_re = Vec::loadu(steps.columns + r * size + i);
      const Vec column_im = Vec::loadu(steps.columns + r * size + half + i);
      for (int b = 0; b < batch; ++b) {
        const Vec minus_kappa = Vec::loadu(kappa + (r * batch + b) * W);
        re[b] = fmadd(column_re, minus_kappa, re[b]);
        im[b] = fmadd(column_im, minus_kappa, im[b]);
      }
    }
    for (int b = 0; b < batch; ++b) {
      re[b].store(x + b * size + i);
      im[b].store(x + b * size + half + i);
    }
  }
}

template <int batch>
void run_rows(const S4Steps& steps, int64_t tokens, const double* u, double* x, double* kappa) {
  for (int64_t t = 0; t < tokens; ++t) {
    const double* inputs[batch];
    for (int b = 0; b < batch; ++b) inputs[b] = u + (b * tokens + t) * W;
    project<batch>(steps, inputs, x, kappa);
    update<batch>(steps, inputs, x, kappa);
  }
}

void run(const S4Steps& steps, int64_t batch, int64_t tokens, const double* u, double* x, double* kappa) {
  const int64_t size = 2 * steps.N * W;
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) run_rows<4>(steps, tokens, u + b * tokens * W, x + b * size, kappa);
  for (; b < batch; ++b) run_rows<1>(steps, tokens, u + b * tokens * W, x + b * size, kappa);
}

}  // namespace

extern const S4StateSteps s4_state_steps = {W, run};

}  // namespace spade_ext::CPU_CAPABILITY
