// One token of the recurrence, in place and in float64. A task is a channel; nothing is allocated but y.
#include <ATen/MemoryOverlap.h>
#include <spade_ext/diagonal/diagonal_cpu.h>
#include <torch/library.h>

namespace spade_ext::diagonal_cpu {

// Numbers (..., N) or (..., N, 2) of any strides.
template <class T, class scalar_t>
class Numbers {
 public:
  explicit Numbers(const at::Tensor& t) : data_(t.data_ptr<scalar_t>()), strides_(t.strides()) {}

  template <class... Index>
  T get(Index... index) const {
    const scalar_t* const x = data_ + offset(index...);
    if constexpr (std::is_same_v<T, double>)
      return *x;
    else
      return {x[0], x[strides_.back()]};
  }
  template <class... Index>
  void set(T value, Index... index) const {
    scalar_t* const x = data_ + offset(index...);
    x[0] = static_cast<scalar_t>(real(value));
    if constexpr (!std::is_same_v<T, double>) x[strides_.back()] = static_cast<scalar_t>(imag(value));
  }

 private:
  template <class... Index>
  int64_t offset(Index... index) const {
    const int64_t indices[] = {index...};
    int64_t sum = 0;
    for (size_t dim = 0; dim < sizeof...(index); ++dim) sum += indices[dim] * strides_[dim];
    return sum;
  }

  scalar_t* data_;
  at::IntArrayRef strides_;
};

at::Tensor diagonal_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                         const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
  constexpr int64_t kStates = 64;  // at a time
  diagonal_shapes::check_step(u, w, b, c, log_dt, state, disc);
  at::assert_no_internal_overlap(state);
  const int64_t B = u.size(0), C = c.size(0), H = u.size(1), S = w.size(0), N = w.size(1);
  const auto y = at::empty({B, C, H}, u.options());
  const auto discretization = diagonal_shapes::parse_disc("diagonal_step", disc, true);
  dispatch(w, [&]<class T, class scalar_t>() {
    constexpr double factor = std::is_same_v<T, double> ? 1 : 2;
    const Numbers<T, scalar_t> w_(w), b_(b), c_(c), x(state);
    const Numbers<double, scalar_t> u_(u), y_(y);
    parallel_for_each(H, [&](int64_t h) {
      const double dt = is_given(log_dt) ? std::exp(Numbers<double, scalar_t>(*log_dt).get(h)) : 1.0;
      T abar[kStates], bbar[kStates];
      for (int64_t i = 0; i < B * C; ++i) y_.set(0, i / C, i % C, h);
      for (int64_t begin = 0; begin < N; begin += kStates) {
        const int64_t size = std::min(kStates, N - begin);
        for (int64_t n = 0; n < size; ++n) {
          const auto d = diagonal_math::discretize<T>(discretization, w_.get(h % S, begin + n), dt, 0);
          abar[n] = d.abar, bbar[n] = d.scale * b_.get(h % S, begin + n);
        }
        for (int64_t row = 0; row < B; ++row) {
          T next[kStates];
          for (int64_t n = 0; n < size; ++n) {
            next[n] = abar[n] * x.get(row, h, begin + n) + bbar[n] * u_.get(row, h);
            flush(next + n, 1);
            x.set(next[n], row, h, begin + n);
          }
          for (int64_t i = 0; i < C; ++i) {
            double sum = 0;
            for (int64_t n = 0; n < size; ++n) sum += real(c_.get(i, h, begin + n) * next[n]);
            y_.set(y_.get(row, i, h) + factor * sum, row, i, h);
          }
        }
      }
    });
  });
  return y;
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) { m.impl("diagonal_step", diagonal_step); }

}  // namespace spade_ext::diagonal_cpu
