// The kernel in blocks of taps: abar^(B m + r) = (abar^B)^m abar^r, so a channel's taps are a product of two
// small matrices, and its gradients of two more. Nothing of size H N L. Equations: README.md.
#include <spade_ext/core/row_products.h>
#include <spade_ext/diagonal/diagonal_cpu.h>
#include <torch/library.h>

#include <vector>

namespace spade_ext::diagonal_cpu {

constexpr int64_t kTaps = 96;  // in a block: whole tiles of row_products at every level

// Real numbers in a state: 2 of a complex one.
template <class T>
constexpr int64_t kParts = sizeof(T) / sizeof(double);

template <class T>
struct KernelProblem : System<T> {
  int64_t C, H, L;
  int64_t width, blocks;  // taps in a block, blocks: the last one may be shorter
  Values<T> c;            // (C, H, N)
  double factor;  // k = factor * Re sum: a complex sum stands for itself and its conjugate, but not in dss

  KernelProblem(const at::Tensor& w, const at::Tensor& c_, const OptionalTensor& log_dt, int64_t length,
                OptionalString disc, double rate)
      : System<T>(w, log_dt, diagonal_shapes::parse_disc("diagonal_kernel", disc, false), rate, length),
        C(c_.size(0)),
        H(c_.size(1)),
        L(length),
        width(std::min(kTaps, length)),
        blocks((length + kTaps - 1) / kTaps),
        c(c_),
        factor(std::is_same_v<T, double> || this->disc == Disc::dss ? 1.0 : 2.0) {}

  int64_t parts() const { return kParts<T> * this->N; }
};

// A row-major matrix of uninitialised scratch memory.
template <class scalar_t>
struct Scratch {
  at::Tensor memory;
  MatrixView<scalar_t> view;

  Scratch(int64_t rows, int64_t columns)
      : memory(at::empty({rows, columns}, c10::CppTypeToScalarType<scalar_t>::value)),
        view{memory.data_ptr<scalar_t>(), columns} {}
  scalar_t* row(int64_t i) const { return view.data + i * view.stride; }
  MatrixView<const scalar_t> read() const { return {view.data, view.stride}; }
};

// z <- base^j for j < count, by doubling. What has decayed to nothing becomes 0 before it is a denormal
// number of scalar_t.
template <class scalar_t, class T>
void powers(T base, int64_t count, Lanes<T>& z) {
  constexpr double kNothing = std::is_same_v<scalar_t, float> ? 1e-30 : 1e-200;
  auto kept = [](double x) { return std::abs(x) < kNothing ? 0.0 : x; };
  double* __restrict re = z.re;
  double* __restrict im = z.im;
  z.set(0, 1);
  for (int64_t known = 1; known < count; known *= 2) {
    const double a = kept(real(base)), b = kept(imag(base));
    const int64_t more = std::min(known, count - known);
#pragma omp simd
    for (int64_t j = 0; j < more; ++j) {
      if constexpr (std::is_same_v<T, double>) {
        re[known + j] = kept(re[j] * a);
      } else {
        re[known + j] = kept(re[j] * a - im[j] * b);
        im[known + j] = kept(re[j] * b + im[j] * a);
      }
    }
    base *= base;
  }
}

// The powers that a channel's states take within a block, and from block to block.
template <class T, class scalar_t>
class Powers {
 public:
  Scratch<scalar_t> within;         // (parts, width): abar^r
  std::vector<Discrete<T>> states;  // (N)

  Powers(const KernelProblem<T>& p, int64_t h)
      : within(p.parts(), p.width), blocks_(p.blocks), of_blocks_(p.blocks) {
    Lanes<T> row(p.width);
    for (int64_t n = 0; n < p.N; ++n) {
      states.push_back(p.discrete(h, n));
      powers<scalar_t>(states[n].abar, p.width, row);
      std::copy_n(row.re, p.width, within.row(kParts<T> * n));
      if constexpr (kParts<T> == 2) std::copy_n(row.im, p.width, within.row(kParts<T> * n + 1));
      block_steps_.push_back(row.get(p.width - 1) * states[n].abar);
    }
  }

  // abar^(width m), m < blocks, until the next call.
  const Lanes<T>& of_blocks(int64_t n) {
    powers<scalar_t>(block_steps_[n], blocks_, of_blocks_);
    return of_blocks_;
  }

 private:
  int64_t blocks_;
  std::vector<T> block_steps_;  // (N): abar^width
  Lanes<T> of_blocks_;
};

// Row h of all outputs. k (C, H, L).
template <class T, class scalar_t>
void kernel_channel(const KernelProblem<T>& p, int64_t h, scalar_t* k) {
  Powers<T, scalar_t> powers(p, h);
  const Scratch<scalar_t> weights(p.C * p.blocks, p.parts());  // Re(cbar abar^(width m)), -Im
  for (int64_t n = 0; n < p.N; ++n) {
    const Lanes<T>& z = powers.of_blocks(n);
    for (int64_t c = 0; c < p.C; ++c) {
      const T cbar = p.factor * powers.states[n].scale * p.c.data[(c * p.H + h) * p.N + n];
      for (int64_t m = 0; m < p.blocks; ++m) {
        const T weight = cbar * z.get(m);
        scalar_t* target = weights.row(c * p.blocks + m) + kParts<T> * n;
        target[0] = real(weight);
        if constexpr (kParts<T> == 2) target[1] = -imag(weight);
      }
    }
  }
  const int64_t full = p.L / p.width;
  const Scratch<scalar_t> last(1, p.width);
  auto multiply = [&](int64_t row, scalar_t* out, int64_t rows) {
    std::fill_n(out, rows * p.width, scalar_t(0));
    row_products<scalar_t>().multiply_add({weights.row(row), p.parts()}, powers.within.read(), {out, p.width},
                                          rows, p.parts(), p.width);
  };
  for (int64_t c = 0; c < p.C; ++c) {
    scalar_t* taps = k + (c * p.H + h) * p.L;
    multiply(c * p.blocks, taps, full);
    if (full == p.blocks) continue;
    multiply(c * p.blocks + full, last.row(0), 1);
    std::copy_n(last.row(0), p.L - full * p.width, taps + full * p.width);
  }
}

// With P = sum_l g[l] abar^l and Q = sum_l l g[l] abar^(l-1), dk = Re(P dcbar + cbar Q dabar), summed over n.
template <class T, class scalar_t>
class PowerSums {
 public:
  PowerSums(const KernelProblem<T>& p, Powers<T, scalar_t>& powers)
      : p_(p),
        powers_(powers),
        of_blocks_(2 * p.parts(), p.blocks),
        later_(p.blocks, p.width),
        sums_(2 * p.parts(), p.width) {
    for (int64_t n = 0; n < p.N; ++n) {
      const Lanes<T>& z = powers.of_blocks(n);
      for (int64_t part = 0; part < kParts<T>; ++part) {
        const double* source = part ? z.im : z.re;
        scalar_t* row = of_blocks_.row(kParts<T> * n + part);
        scalar_t* weighted = of_blocks_.row(p.parts() + kParts<T> * n + part);
        for (int64_t m = 0; m < p.blocks; ++m) {
          row[m] = source[m];
          weighted[m] = double(m * p.width) * source[m];
        }
      }
    }
  }

  // Sums over the blocks of g (L), which P and Q then take over the taps of a block.
  void add_blocks(const scalar_t* g) {
    first_ = g[0];
    std::copy(g + 1, g + p_.L, later_.row(0));
    std::fill(later_.row(0) + p_.L - 1, later_.row(p_.blocks), scalar_t(0));
    std::fill_n(sums_.row(0), 2 * p_.parts() * p_.width, scalar_t(0));
    row_products<scalar_t>().multiply_add(of_blocks_.read(), later_.read(), sums_.view, 2 * p_.parts(),
                                          p_.blocks, p_.width);
  }

  T P(int64_t n) const {
    return T(first_) +
           powers_.states[n].abar * over_taps(n, [&](int64_t row, int64_t r) { return sums_.row(row)[r]; });
  }
  T Q(int64_t n) const {
    return over_taps(n, [&](int64_t row, int64_t r) {
      return scalar_t(r + 1) * sums_.row(row)[r] + sums_.row(p_.parts() + row)[r];
    });
  }

 private:
  // sum_r abar^r value(r), value's parts in rows of sums_.
  template <class Value>
  T over_taps(int64_t n, const Value& value) const {
    const int64_t i = kParts<T> * n;
    const scalar_t* re = powers_.within.row(i);
    scalar_t total_re = 0, total_im = 0;
    if constexpr (kParts<T> == 1) {
#pragma omp simd reduction(+ : total_re)
      for (int64_t r = 0; r < p_.width; ++r) total_re += re[r] * value(i, r);
      return total_re;
    } else {
      const scalar_t* im = powers_.within.row(i + 1);
#pragma omp simd reduction(+ : total_re, total_im)
      for (int64_t r = 0; r < p_.width; ++r) {
        const scalar_t x = value(i, r), y = value(i + 1, r);
        total_re += re[r] * x - im[r] * y;
        total_im += re[r] * y + im[r] * x;
      }
      return T(total_re, total_im);
    }
  }

  const KernelProblem<T>& p_;
  const Powers<T, scalar_t>& powers_;
  scalar_t first_ = 0;
  Scratch<scalar_t> of_blocks_;  // (2 parts, blocks): abar^(width m), and width m times this
  Scratch<scalar_t> later_;      // (blocks, width): g[l + 1]
  Scratch<scalar_t> sums_;       // (2 parts, width)
};

// Writes row h of grad_c and grad_log_dt, and what channel h adds to grad_w. The complex derivative of a real
// function is stored conjugated, as autograd does.
template <class T, class scalar_t>
void backward_channel(const KernelProblem<T>& p, int64_t h, const scalar_t* grad_k, T* grad_w_row, T* grad_c,
                      double* grad_log_dt) {
  Powers<T, scalar_t> powers(p, h);
  PowerSums<T, scalar_t> sums(p, powers);
  std::vector<T> by_abar(p.N), by_scale(p.N);
  for (int64_t c = 0; c < p.C; ++c) {
    sums.add_blocks(grad_k + (c * p.H + h) * p.L);
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t i = (c * p.H + h) * p.N + n;
      const T scale = powers.states[n].scale, by_cbar = p.factor * sums.P(n);
      by_abar[n] += p.factor * scale * p.c.data[i] * sums.Q(n);
      by_scale[n] += p.c.data[i] * by_cbar;
      grad_c[i] = conj(scale * by_cbar);
    }
  }
  double by_dt = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    const Discrete<T>& d = powers.states[n];
    grad_w_row[n] = conj(d.abar_w * by_abar[n] + d.scale_w * by_scale[n]);
    by_dt += real(d.abar_dt * by_abar[n] + d.scale_dt * by_scale[n]);
  }
  grad_log_dt[h] = p.dt(h) * by_dt;
}

at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                           int64_t length, OptionalString disc, double rate) {
  diagonal_shapes::check_kernel(w, c, log_dt, length, disc, rate);
  const auto k = at::empty({c.size(0), c.size(1), length}, c.options());
  if (k.numel() == 0) return k;
  dispatch(w, [&]<class T, class scalar_t>() {
    const KernelProblem<T> p(w, c, log_dt, length, disc, rate);
    scalar_t* data = k.data_ptr<scalar_t>();
    parallel_for_each(p.H, [&](int64_t h) { kernel_channel(p, h, data); });
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
          p.H, [&](int64_t h) { backward_channel(p, h, g, rows.data + h * p.N, by_c.data, by_log_dt.data); });
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
