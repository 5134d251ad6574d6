// Compiled once a level, with CPU_CAPABILITY naming it, in which namespace everything stands
// (core/row_products_level.cpp).
#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>
#include <spade_ext/long_conv/long_conv_transform.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using at::vec::fmadd;
using at::vec::fmsub;
using at::vec::fnmadd;
using at::vec::Vectorized;

template <class T>
struct Complex {
  Vectorized<T> re, im;

  static constexpr int64_t kSize = 2 * Vectorized<T>::size();
  static Complex load(const T* x) { return {Vectorized<T>::loadu(x), Vectorized<T>::loadu(x + kSize / 2)}; }
  void store(T* x) const {
    re.store(x);
    im.store(x + kSize / 2);
  }

  Complex operator+(const Complex& b) const { return {re + b.re, im + b.im}; }
  Complex operator-(const Complex& b) const { return {re - b.re, im - b.im}; }
  Complex operator*(const Vectorized<T>& b) const { return {re * b, im * b}; }
  Complex operator*(const Complex& b) const {
    return {fmsub(re, b.re, im * b.im), fmadd(re, b.im, im * b.re)};
  }
  Complex conj() const { return {re, Vectorized<T>(0) - im}; }
};

// a + b c, with a real c
template <class T>
Complex<T> add_scaled(const Complex<T>& a, const Complex<T>& b, const Vectorized<T>& c) {
  return {fmadd(b.re, c, a.re), fmadd(b.im, c, a.im)};
}
template <class T>
Complex<T> subtract_scaled(const Complex<T>& a, const Complex<T>& b, const Vectorized<T>& c) {
  return {fnmadd(b.re, c, a.re), fnmadd(b.im, c, a.im)};
}

// conj(a) b
template <class T>
Complex<T> conj_times(const Complex<T>& a, const Complex<T>& b) {
  return {fmadd(a.re, b.re, a.im * b.im), fmsub(a.re, b.im, a.im * b.re)};
}

// x times a twiddle factor, conjugated in the inverse
template <bool inverse, class T>
Complex<T> turn(const Complex<T>& x, const T* twiddle) {
  const Complex<T> w{Vectorized<T>(twiddle[0]), Vectorized<T>(twiddle[1])};
  return inverse ? conj_times(w, x) : w * x;
}

// a - i b, in the inverse a + i b
template <bool inverse, class T>
Complex<T> add_quarter(const Complex<T>& a, const Complex<T>& b) {
  if (inverse) return {a.re - b.im, a.im + b.re};
  return {a.re + b.im, a.im - b.re};
}
template <bool inverse, class T>
Complex<T> subtract_quarter(const Complex<T>& a, const Complex<T>& b) {
  return add_quarter<!inverse>(a, b);
}

// The transform of R numbers in place. `half`: those from R / 2 on are zeros.
template <int R, bool inverse, bool half, class T>
struct Butterfly;

template <bool inverse, bool half, class T>
struct Butterfly<1, inverse, half, T> {
  static void run(Complex<T>*) {}
};

template <bool inverse, bool half, class T>
struct Butterfly<2, inverse, half, T> {
  C10_ALWAYS_INLINE static void run(Complex<T>* x) {
    if (half) {
      x[1] = x[0];
      return;
    }
    const auto a = x[0], b = x[1];
    x[0] = a + b;
    x[1] = a - b;
  }
};

template <bool inverse, bool half, class T>
struct Butterfly<3, inverse, half, T> {
  C10_ALWAYS_INLINE static void run(Complex<T>* x) {
    const Vectorized<T> sine(T(0.86602540378443864676));
    const auto sum = x[1] + x[2], difference = (x[1] - x[2]) * sine;
    const auto rest = subtract_scaled(x[0], sum, Vectorized<T>(T(0.5)));
    x[0] = x[0] + sum;
    x[1] = add_quarter<inverse>(rest, difference);
    x[2] = subtract_quarter<inverse>(rest, difference);
  }
};

template <bool inverse, bool half, class T>
struct Butterfly<4, inverse, half, T> {
  C10_ALWAYS_INLINE static void run(Complex<T>* x) {
    const auto a = half ? x[0] : x[0] + x[2], b = half ? x[0] : x[0] - x[2];
    const auto c = half ? x[1] : x[1] + x[3], d = half ? x[1] : x[1] - x[3];
    x[0] = a + c;
    x[1] = add_quarter<inverse>(b, d);
    x[2] = a - c;
    x[3] = subtract_quarter<inverse>(b, d);
  }
};

template <bool inverse, bool half, class T>
struct Butterfly<5, inverse, half, T> {
  C10_ALWAYS_INLINE static void run(Complex<T>* x) {
    const Vectorized<T> cos1(T(0.30901699437494742410)), cos2(T(-0.80901699437494742410));
    const Vectorized<T> sin1(T(0.95105651629515357212)), sin2(T(0.58778525229247312917));
    const auto sum1 = x[1] + x[4], difference1 = x[1] - x[4];
    const auto sum2 = x[2] + x[3], difference2 = x[2] - x[3];
    const auto a1 = add_scaled(add_scaled(x[0], sum1, cos1), sum2, cos2);
    const auto a2 = add_scaled(add_scaled(x[0], sum1, cos2), sum2, cos1);
    const auto b1 = add_scaled(difference1 * sin1, difference2, sin2);
    const auto b2 = subtract_scaled(difference1 * sin2, difference2, sin1);
    x[0] = x[0] + sum1 + sum2;
    x[1] = add_quarter<inverse>(a1, b1);
    x[2] = add_quarter<inverse>(a2, b2);
    x[3] = subtract_quarter<inverse>(a2, b2);
    x[4] = subtract_quarter<inverse>(a1, b1);
  }
};

template <bool inverse, bool half, class T>
struct Butterfly<8, inverse, half, T> {
  C10_ALWAYS_INLINE static void run(Complex<T>* x) {
    Complex<T> even[4], odd[4];
    for (int q = 0; q < 4; ++q) {
      even[q] = half ? x[q] : x[q] + x[q + 4];
      odd[q] = half ? x[q] : x[q] - x[q + 4];
    }
    Butterfly<4, inverse, false, T>::run(even);
    for (int q = 0; q < 4; ++q) x[2 * q] = even[q];
    // odd[q] turns by q eighths. Those of q = 1, 3 are sqrt(1/2) times sums of real and imaginary parts.
    const Vectorized<T> root(T(0.70710678118654752440));
    const auto one = add_quarter<inverse>(odd[1], odd[1]);
    const auto three = subtract_quarter<inverse>(odd[3], odd[3]);  // with its sign changed
    const auto sum = one - three, difference = one + three;
    const auto a = add_quarter<inverse>(odd[0], odd[2]), b = subtract_quarter<inverse>(odd[0], odd[2]);
    x[1] = add_scaled(a, sum, root);
    x[5] = subtract_scaled(a, sum, root);
    const auto c = difference * root;
    x[3] = add_quarter<inverse>(b, c);
    x[7] = subtract_quarter<inverse>(b, c);
  }
};

// Decimation in frequency: R numbers m apart become one of each of R blocks.
template <int R, bool half, class T>
void forward_pass(T* x, int64_t m, const T* twiddles) {
  constexpr int64_t size = Complex<T>::kSize;
  for (int64_t j = 0; j < m; ++j, x += size, twiddles += 2 * (R - 1)) {
    Complex<T> v[R];
    for (int q = 0; q < (half ? R / 2 : R); ++q) v[q] = Complex<T>::load(x + q * m * size);
    Butterfly<R, false, half, T>::run(v);
    v[0].store(x);
    for (int q = 0; q < R - 1; ++q) turn<false>(v[q + 1], twiddles + 2 * q).store(x + (q + 1) * m * size);
  }
}

// Decimation in time, what forward_pass did undone but for a factor R. `half`: only the first half of the
// results is wanted.
template <int R, bool half, class T>
void inverse_pass(T* x, int64_t m, const T* twiddles) {
  constexpr int64_t size = Complex<T>::kSize;
  for (int64_t j = 0; j < m; ++j, x += size, twiddles += 2 * (R - 1)) {
    Complex<T> v[R];
    v[0] = Complex<T>::load(x);
    for (int q = 0; q < R - 1; ++q)
      v[q + 1] = turn<true>(Complex<T>::load(x + (q + 1) * m * size), twiddles + 2 * q);
    Butterfly<R, true, false, T>::run(v);
    for (int q = 0; q < (half ? R / 2 : R); ++q) v[q].store(x + q * m * size);
  }
}

template <int R, bool inverse, class T>
void leaves(T* x, int64_t count) {
  constexpr int64_t size = Complex<T>::kSize;
  for (int64_t i = 0; i < count; ++i, x += R * size) {
    Complex<T> v[R];
    for (int q = 0; q < R; ++q) v[q] = Complex<T>::load(x + q * size);
    Butterfly<R, inverse, false, T>::run(v);
    for (int q = 0; q < R; ++q) v[q].store(x + q * size);
  }
}

template <int R, bool inverse, class T>
void run_pass(const TransformPass<T>& pass, bool half, T* x) {
  const int64_t m = pass.size / R;
  if (inverse) {
    half ? inverse_pass<R, true>(x, m, pass.twiddles) : inverse_pass<R, false>(x, m, pass.twiddles);
  } else {
    half ? forward_pass<R, true>(x, m, pass.twiddles) : forward_pass<R, false>(x, m, pass.twiddles);
  }
}

template <bool inverse, class T>
void run_pass(const TransformPass<T>& pass, bool half, T* x) {
  if (pass.radix == 8) return run_pass<8, inverse>(pass, half, x);
  if (pass.radix == 4) return run_pass<4, inverse>(pass, half, x);
  run_pass<2, inverse>(pass, half, x);
}

template <bool inverse, class T>
void run_leaves(int64_t leaf, T* x, int64_t count) {
  if (leaf == 8) return leaves<8, inverse>(x, count);
  if (leaf == 5) return leaves<5, inverse>(x, count);
  if (leaf == 4) return leaves<4, inverse>(x, count);
  if (leaf == 3) return leaves<3, inverse>(x, count);
  if (leaf == 2) leaves<2, inverse>(x, count);
}

// `count` signals, `stride` elements apart.
template <class T>
struct Signals {
  T* data;
  int64_t stride, count;
  bool half;
};

// Transforms `in`, visits all pairs of frequencies (f, -f), transforms `out` back, depth first: what two
// blocks need is done while they are in a fast cache. A block begins at `level` passes below the whole.
// pairs(lo, hi, count) visits lo + i and hi - 1 - i.
template <class T, class Pairs>
class Sweep {
 public:
  Sweep(const TransformPlan<T>& plan, Signals<T> in, Signals<T> out, Pairs& pairs)
      : plan_(plan), in_(in), out_(out), pairs_(pairs) {}

  // The block of the frequencies that are multiples of points / its size, -f among them.
  void first(int level) {
    forward(level, 0);
    if (is_last(level)) {
      const int64_t whole = points_of(level);
      const int64_t leaf = plan_.leaf;
      if (level < plan_.pass_count) pairs_(leaf, whole, (whole - leaf + 1) / 2);
      pairs_(1, leaf, leaf / 2);
      pairs_(0, 1, 1);
    } else {
      const auto& pass = plan_.passes[level];
      const int64_t m = pass.size / pass.radix;
      first(level + 1);
      for (int64_t q = 1; q < pass.radix / 2; ++q) two(level + 1, q * m, (pass.radix - q) * m);
      middle(level + 1, pass.radix / 2 * m);
    }
    inverse(level, 0);
  }

 private:
  int64_t points_of(int level) const {
    return level < plan_.pass_count ? plan_.passes[level].size : plan_.leaf;
  }
  bool is_last(int level) const { return level + 1 >= plan_.pass_count; }

  // A block whose frequencies -f lie in itself, in reverse order.
  void middle(int level, int64_t at) {
    forward(level, at);
    if (is_last(level)) {
      const int64_t size = points_of(level);
      pairs_(at, at + size, (size + 1) / 2);
    } else {
      const auto& pass = plan_.passes[level];
      const int64_t m = pass.size / pass.radix;
      for (int64_t q = 0; q < pass.radix / 2; ++q) two(level + 1, at + q * m, at + (pass.radix - 1 - q) * m);
    }
    inverse(level, at);
  }

  // Two blocks with the frequencies f and, in reverse order, -f.
  void two(int level, int64_t lo, int64_t hi) {
    forward(level, lo);
    forward(level, hi);
    if (is_last(level)) {
      const int64_t size = points_of(level);
      pairs_(lo, hi + size, size);
    } else {
      const auto& pass = plan_.passes[level];
      const int64_t m = pass.size / pass.radix;
      for (int64_t q = 0; q < pass.radix; ++q) two(level + 1, lo + q * m, hi + (pass.radix - 1 - q) * m);
    }
    inverse(level, lo);
    inverse(level, hi);
  }

  void forward(int level, int64_t at) {
    for (int64_t i = 0; i < in_.count; ++i) {
      T* x = in_.data + i * in_.stride + at * Complex<T>::kSize;
      if (level < plan_.pass_count) run_pass<false>(plan_.passes[level], level == 0 && in_.half, x);
      if (is_last(level)) run_leaves<false>(plan_.leaf, x, points_of(level) / plan_.leaf);
    }
  }

  void inverse(int level, int64_t at) {
    for (int64_t i = 0; i < out_.count; ++i) {
      T* x = out_.data + i * out_.stride + at * Complex<T>::kSize;
      if (is_last(level)) run_leaves<true>(plan_.leaf, x, points_of(level) / plan_.leaf);
      if (level < plan_.pass_count) run_pass<true>(plan_.passes[level], level == 0 && out_.half, x);
    }
  }

  const TransformPlan<T>& plan_;
  Signals<T> in_, out_;
  Pairs& pairs_;
};

template <class T, class Pairs>
void sweep(const TransformPlan<T>& plan, Signals<T> in, Signals<T> out, Pairs pairs) {
  Sweep<T, Pairs>(plan, in, out, pairs).first(0);
}

template <class T>
struct PairFrequencies {
  const TransformPlan<T>& plan;
  int64_t* frequencies;

  void operator()(int64_t lo, int64_t, int64_t count) {
    for (int64_t i = 0; i < count; ++i) *frequencies++ = frequency(lo + i);
  }

  int64_t frequency(int64_t position) const {
    int64_t result = 0, factor = 1;
    for (int level = 0; level < plan.pass_count; ++level) {
      const auto& pass = plan.passes[level];
      const int64_t m = pass.size / pass.radix;
      result += factor * (position / m);
      position %= m;
      factor *= pass.radix;
    }
    return result + factor * position;
  }
};

template <class T>
void pair_frequencies(const TransformPlan<T>& plan, int64_t* frequencies) {
  sweep(plan, Signals<T>{}, Signals<T>{}, PairFrequencies<T>{plan, frequencies});
}

// What a pair of frequencies is multiplied by: y[f] = a z[f] + b conj(z[-f]), y[-f] = a2 z[-f] - conj(b
// z[f]).
template <class T>
struct Factors {
  Complex<T> a, a2, b;

  static constexpr int64_t kSize = 3 * Complex<T>::kSize;
  static Factors load(const T* x) {
    constexpr int64_t size = Complex<T>::kSize;
    return {Complex<T>::load(x), Complex<T>::load(x + size), Complex<T>::load(x + 2 * size)};
  }
  void store(T* x) const {
    constexpr int64_t size = Complex<T>::kSize;
    a.store(x);
    a2.store(x + size);
    b.store(x + 2 * size);
  }
};

template <class T>
struct Spectrum {
  const T* kernel;
  const T* twiddles;
  T* spectrum;
  T half;  // 1/2, over the number of points

  void operator()(int64_t lo, int64_t hi, int64_t count) {
    constexpr int64_t size = Complex<T>::kSize;
    for (int64_t i = 0; i < count; ++i, twiddles += 2, spectrum += Factors<T>::kSize) {
      const auto z = Complex<T>::load(kernel + (lo + i) * size) * Vectorized<T>(half);
      const auto z2 = (Complex<T>::load(kernel + (hi - 1 - i) * size) * Vectorized<T>(half)).conj();
      const auto even = z + z2,
                 odd = (z - z2) * Vectorized<T>(T(0.5));  // odd: i/2 times the odd tokens' transform
      const auto turned = turn<false>(odd, twiddles);
      const auto d = odd - turned;
      Factors<T>{even + d, (even - d).conj(), odd + turned}.store(spectrum);
    }
  }
};

template <class T>
void spectrum(const TransformPlan<T>& plan, T* kernel, T* spectrum) {
  sweep(plan, Signals<T>{kernel, 0, 1, plan.short_kernels}, Signals<T>{},
        Spectrum<T>{kernel, plan.pair_twiddles, spectrum, T(0.5) / plan.points});
}

template <class T>
struct Products {
  const T* spectra;
  int64_t spectrum_size;
  Signals<T> out;  // the last one holds the signal

  void operator()(int64_t lo, int64_t hi, int64_t count) {
    constexpr int64_t size = Complex<T>::kSize;
    for (int64_t i = 0; i < count; ++i, spectra += Factors<T>::kSize) {
      T* first = out.data + (lo + i) * size;
      T* second = out.data + (hi - 1 - i) * size;
      const int64_t signal = (out.count - 1) * out.stride;
      const auto z = Complex<T>::load(first + signal), z2 = Complex<T>::load(second + signal);
      for (int64_t c = 0; c < out.count; ++c) {
        const auto k = Factors<T>::load(spectra + c * spectrum_size);
        (k.a * z + conj_times(z2, k.b)).store(first + c * out.stride);
        (k.a2 * z2 - (k.b * z).conj()).store(second + c * out.stride);
      }
    }
  }
};

template <class T>
void convolve(const TransformPlan<T>& plan, const T* spectra, int64_t C, T* rows) {
  const int64_t stride = plan.points * Complex<T>::kSize;
  const Signals<T> in{rows + (C - 1) * stride, stride, 1, plan.short_signals};
  const Signals<T> out{rows, stride, C, plan.short_signals};
  sweep(plan, in, out, Products<T>{spectra, plan.pairs * Factors<T>::kSize, out});
}

// The transposed products, and the products that sum to the gradients of the spectra.
template <class T, bool to_signal, bool to_kernel>
struct BackwardProducts {
  const T* spectra;
  T* correlations;
  int64_t spectrum_size;
  Signals<T> rows;  // the signal, then the gradients of the outputs

  void operator()(int64_t lo, int64_t hi, int64_t count) {
    constexpr int64_t size = Complex<T>::kSize;
    for (int64_t i = 0; i < count; ++i) {
      T* first = rows.data + (lo + i) * size;
      T* second = rows.data + (hi - 1 - i) * size;
      Complex<T> z, z2, sum{T(0), T(0)}, sum2{T(0), T(0)};
      if (to_kernel) z = Complex<T>::load(first), z2 = Complex<T>::load(second);
      for (int64_t c = 0; c + 1 < rows.count; ++c) {
        const auto g = Complex<T>::load(first + (c + 1) * rows.stride);
        const auto g2 = Complex<T>::load(second + (c + 1) * rows.stride);
        if (to_signal) {
          const auto k = Factors<T>::load(spectra + c * spectrum_size);
          sum = sum + conj_times(k.a, g) - (k.b * g2).conj();
          sum2 = sum2 + conj_times(k.a2, g2) + k.b * g.conj();
        }
        if (to_kernel) {
          T* correlation = correlations + c * spectrum_size;
          const auto s = Factors<T>::load(correlation);
          Factors<T>{s.a + conj_times(z, g), s.a2 + conj_times(z2, g2), s.b + g * z2 - (g2 * z).conj()}.store(
              correlation);
        }
      }
      if (to_signal) {
        sum.store(first);
        sum2.store(second);
        spectra += Factors<T>::kSize;
      }
      if (to_kernel) correlations += Factors<T>::kSize;
    }
  }
};

template <bool to_signal, bool to_kernel, class T>
void backward(const TransformPlan<T>& plan, const T* spectra, int64_t C, T* rows, T* correlations) {
  const int64_t stride = plan.points * Complex<T>::kSize;
  const Signals<T> all{rows, stride, 1 + C, plan.short_signals};
  const Signals<T> gradients{rows + stride, stride, C, plan.short_signals};
  const Signals<T> signal{rows, stride, 1, plan.short_signals};
  sweep(
      plan, to_kernel ? all : gradients, to_signal ? signal : Signals<T>{},
      BackwardProducts<T, to_signal, to_kernel>{spectra, correlations, plan.pairs * Factors<T>::kSize, all});
}

template <class T>
void backward(const TransformPlan<T>& plan, const T* spectra, int64_t C, T* rows, T* correlations) {
  if (!correlations) return backward<true, false>(plan, spectra, C, rows, correlations);
  if (!spectra) return backward<false, true>(plan, spectra, C, rows, correlations);
  backward<true, true>(plan, spectra, C, rows, correlations);
}

template <class T>
struct Correlation {
  const T* correlation;
  const T* twiddles;
  T* kernel;
  T half;  // 1/2, over the number of points

  void operator()(int64_t lo, int64_t hi, int64_t count) {
    constexpr int64_t size = Complex<T>::kSize;
    for (int64_t i = 0; i < count; ++i, twiddles += 2, correlation += Factors<T>::kSize) {
      const auto s = Factors<T>::load(correlation);
      const auto a = s.a * Vectorized<T>(half), a2 = (s.a2 * Vectorized<T>(half)).conj();
      const auto b = s.b * Vectorized<T>(T(0.5) * half), difference = (a - a2) * Vectorized<T>(T(0.5));
      const auto odd = difference + b + turn<true>(b - difference, twiddles);
      (a + a2 + odd).store(kernel + (lo + i) * size);
      (a + a2 - odd).conj().store(kernel + (hi - 1 - i) * size);
    }
  }
};

template <class T>
void correlate(const TransformPlan<T>& plan, const T* correlation, T* kernel) {
  sweep(plan, Signals<T>{}, Signals<T>{kernel, 0, 1, plan.short_kernels},
        Correlation<T>{correlation, plan.pair_twiddles, kernel, T(0.5) / plan.points});
}

constexpr int64_t kPrefetch =
    16;  // tokens ahead: a row of (B, L, H) is a page or a part of one away from the next

// Channels of one vector, where each has its tokens together or the strides are any.
template <class T>
void load_vector(SignalView<const T> signal, int64_t channels, int64_t tokens, T* rows) {
  constexpr int lanes = Vectorized<T>::size();
  const auto [data, token_stride, channel_stride] = signal;
  int64_t t = 0;
  if (token_stride == 1 && channels == lanes) {
    for (; t + lanes <= tokens; t += lanes) {
      at::vec::transpose_mxn<T, lanes, lanes>(data + t, channel_stride, rows + t * lanes, lanes);
    }
  }
  for (; t < tokens; ++t) {
    for (int64_t h = 0; h < lanes; ++h) {
      rows[t * lanes + h] = h < channels ? data[t * token_stride + h * channel_stride] : T(0);
    }
  }
}

template <class T>
void store_vector(const T* rows, int64_t channels, int64_t tokens, SignalView<T> signal) {
  constexpr int lanes = Vectorized<T>::size();
  const auto [data, token_stride, channel_stride] = signal;
  int64_t t = 0;
  if (token_stride == 1 && channels == lanes) {
    for (; t + lanes <= tokens; t += lanes) {
      at::vec::transpose_mxn<T, lanes, lanes>(rows + t * lanes, lanes, data + t, channel_stride);
    }
  }
  for (; t < tokens; ++t) {
    for (int64_t h = 0; h < channels; ++h) data[t * token_stride + h * channel_stride] = rows[t * lanes + h];
  }
}

template <class T>
int64_t lanes_from(int64_t h, int64_t channels) {
  constexpr int64_t lanes = Vectorized<T>::size();
  return channels - h < lanes ? channels - h : lanes;
}

template <class T>
void load(SignalView<const T> signal, int64_t channels, int64_t tokens, int64_t padded, T* rows,
          int64_t stride) {
  constexpr int64_t lanes = Vectorized<T>::size();
  const auto [data, token_stride, channel_stride] = signal;
  if (channel_stride == 1) {
    for (int64_t t = 0; t < tokens; ++t) {
      const T* token = data + t * token_stride;
      __builtin_prefetch(token + kPrefetch * token_stride);
      T* row = rows + t * lanes;
      for (int64_t h = 0; h < channels; h += lanes, row += stride) {
        Vectorized<T>::loadu(token + h, lanes_from<T>(h, channels)).store(row);
      }
    }
  }
  for (int64_t h = 0; h < channels; h += lanes, rows += stride) {
    if (channel_stride != 1) {
      const SignalView<const T> vector{data + h * channel_stride, token_stride, channel_stride};
      load_vector(vector, lanes_from<T>(h, channels), tokens, rows);
    }
    for (int64_t t = tokens; t < padded; ++t) Vectorized<T>(0).store(rows + t * lanes);
  }
}

template <class T>
void store(const T* rows, int64_t stride, int64_t channels, int64_t tokens, SignalView<T> signal) {
  constexpr int64_t lanes = Vectorized<T>::size();
  const auto [data, token_stride, channel_stride] = signal;
  if (channel_stride == 1) {
    for (int64_t t = 0; t < tokens; ++t) {
      T* token = data + t * token_stride;
      __builtin_prefetch(token + kPrefetch * token_stride, 1);
      const T* row = rows + t * lanes;
      for (int64_t h = 0; h < channels; h += lanes, row += stride) {
        Vectorized<T>::loadu(row).store(token + h, static_cast<int>(lanes_from<T>(h, channels)));
      }
    }
    return;
  }
  for (int64_t h = 0; h < channels; h += lanes, rows += stride) {
    const SignalView<T> vector{data + h * channel_stride, token_stride, channel_stride};
    store_vector(rows, lanes_from<T>(h, channels), tokens, vector);
  }
}

template <class T>
constexpr LongConvTransform<T> kTable = {Vectorized<T>::size(), load<T>,     store<T>,    pair_frequencies<T>,
                                         spectrum<T>,           convolve<T>, backward<T>, correlate<T>};

}  // namespace

extern const LongConvTransform<float> long_conv_transform_float = kTable<float>;
extern const LongConvTransform<double> long_conv_transform_double = kTable<double>;

}  // namespace spade_ext::CPU_CAPABILITY
