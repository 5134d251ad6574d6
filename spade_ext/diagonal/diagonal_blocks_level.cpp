// Compiled once a level (core/cpu_levels.h).
#include <ATen/cpu/vec/vec.h>
#include <spade_ext/diagonal/diagonal_blocks.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using namespace diagonal_blocks;
using at::vec::fmadd;
using at::vec::Vectorized;

// A matrix of vectors of channels; strides in vectors.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride;
  T* at(int64_t row, int64_t column) const {
    return data + (row * row_stride + column * column_stride) * Vectorized<T>::size();
  }
  Matrix from(int64_t row, int64_t column) const { return {at(row, column), row_stride, column_stride}; }
};

template <int rows, int columns, class T>
void tile(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, int64_t n, bool add) {
  using Vec = Vectorized<T>;
  Vec sums[rows][columns];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) sums[r][c] = add ? Vec::loadu(out.at(r, c)) : Vec(0);
  }
  for (int64_t i = 0; i < n; ++i) {
    Vec factors[columns];
    for (int c = 0; c < columns; ++c) factors[c] = Vec::loadu(b.at(i, c));
    for (int r = 0; r < rows; ++r) {
      const Vec weight = Vec::loadu(a.at(r, i));
      for (int c = 0; c < columns; ++c) sums[r][c] = fmadd(weight, factors[c], sums[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) sums[r][c].store(out.at(r, c));
  }
}

template <int rows, class T>
void strip(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, int64_t columns, int64_t n, bool add) {
  int64_t c = 0;
  for (; c + 2 <= columns; c += 2) tile<rows, 2>(a, b.from(0, c), out.from(0, c), n, add);
  if (c < columns) tile<rows, 1>(a, b.from(0, c), out.from(0, c), n, add);
}

// out (rows, columns) = or += a (rows, n) b (n, columns), in each channel for itself.
template <class T>
void multiply(Matrix<const T> a, Matrix<const T> b, Matrix<T> out, int64_t rows, int64_t columns, int64_t n,
              bool add) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) strip<4>(a.from(r, 0), b, out.from(r, 0), columns, n, add);
  if (r + 2 <= rows) strip<2>(a.from(r, 0), b, out.from(r, 0), columns, n, add), r += 2;
  if (r < rows) strip<1>(a.from(r, 0), b, out.from(r, 0), columns, n, add);
}

// Below it a number counts as 0, before it is denormal, which is slow.
template <class T>
constexpr double kNothing = sizeof(T) == sizeof(float) ? 1e-35 : 1e-200;

// A state of one n over blocks that add `added` to one of zeros.
template <bool pairs, class T>
void advance(const double* __restrict power_re, const double* __restrict power_im, double sign,
             const T* __restrict added_re, const T* __restrict added_im, double* __restrict re,
             double* __restrict im) {
  auto kept = [](double x) { return std::abs(x) < kNothing<T> ? 0.0 : x; };
#pragma omp simd
  for (int64_t i = 0; i < Vectorized<T>::size(); ++i) {
    if constexpr (pairs) {
      const double p_im = sign * power_im[i], old_re = re[i], old_im = im[i];
      re[i] = kept(power_re[i] * old_re - p_im * old_im + added_re[i]);
      im[i] = kept(power_re[i] * old_im + p_im * old_re + added_im[i]);
    } else {
      re[i] = kept(power_re[i] * re[i] + added_re[i]);
    }
  }
}

// Moves `state` over blocks, backwards in time where `reverse`, with the conjugate power. `sums` (blocks,
// rows), what each block adds, becomes the state before it. Within the blocks the states are of type T, from
// one call to the next in float64.
template <bool pairs, class T>
void carry(const BlockSystem<T>& system, int64_t blocks, bool reverse, double* state, T* sums) {
  using Vec = Vectorized<T>;
  constexpr int64_t W = Vec::size();
  const int64_t N = system.N, rows = system.rows;
  const double* const power = system.powers + (blocks - 1) * rows * W;
  const double sign = reverse ? -1 : 1;
  for (int64_t n = 0; n < N; ++n) {
    double *re = state + n * W, *im = state + (N + n) * W;
    T start[2][W], added[2][W];
    for (int64_t i = 0; i < W; ++i) {
      start[0][i] = static_cast<T>(re[i]);
      if constexpr (pairs) start[1][i] = static_cast<T>(im[i]);
    }
    const Vec a_re = Vec::loadu(system.power + n * W);
    Vec x_re = Vec::loadu(start[0]), z_re(0);  // from `state`, and from a state of zeros
    Vec a_im(0), minus_a_im(0), x_im(0), z_im(0);
    if constexpr (pairs) {
      a_im = Vec::loadu(system.power + (N + n) * W) * Vec(T(sign));
      minus_a_im = a_im.neg();
      x_im = Vec::loadu(start[1]);
    }
    for (int64_t i = 0; i < blocks; ++i) {
      T* const sum_re = sums + ((reverse ? blocks - 1 - i : i) * rows + n) * W;
      const Vec s_re = Vec::loadu(sum_re);
      x_re.store(sum_re);
      if constexpr (pairs) {
        T* const sum_im = sum_re + N * W;
        const Vec s_im = Vec::loadu(sum_im);
        x_im.store(sum_im);
        const Vec next_x = fmadd(a_re, x_re, fmadd(minus_a_im, x_im, s_re));
        x_im = fmadd(a_re, x_im, fmadd(a_im, x_re, s_im)), x_re = next_x;
        const Vec next_z = fmadd(a_re, z_re, fmadd(minus_a_im, z_im, s_re));
        z_im = fmadd(a_re, z_im, fmadd(a_im, z_re, s_im)), z_re = next_z;
      } else {
        x_re = fmadd(a_re, x_re, s_re);
        z_re = fmadd(a_re, z_re, s_re);
      }
    }
    z_re.store(added[0]);
    if constexpr (pairs) z_im.store(added[1]);
    advance<pairs, T>(power + n * W, power + (N + n) * W, sign, added[0], added[1], re, im);
  }
}

template <class T>
void carry(const BlockSystem<T>& system, int64_t blocks, bool reverse, double* state, T* sums) {
  if (system.rows == system.N)
    carry<false>(system, blocks, reverse, state, sums);
  else
    carry<true>(system, blocks, reverse, state, sums);
}

// The states before each block, (blocks, rows).
template <class T>
void states(const BlockSystem<T>& system, int64_t blocks, Matrix<const T> u, double* state, T* x) {
  const Matrix<const T> in{system.in, 1, kBlock};
  multiply<T>(u, in, {x, system.rows, 1}, blocks, system.rows, kBlock, false);
  carry(system, blocks, false, state, x);
}

template <class T>
void forward(const BlockSystem<T>& system, int64_t blocks, const T* u_, double* state, T* y, T* x) {
  constexpr int64_t W = Vectorized<T>::size();
  const Matrix<const T> u{u_, kBlock, 1};
  states(system, blocks, u, state, x);
  if (!y) return;
  for (int64_t c = 0; c < system.C; ++c) {
    const Matrix<T> y_c{y + c * kTile * W, kBlock, 1};
    const Matrix<const T> out{system.out + c * system.rows * kBlock * W, kBlock, 1};
    const Matrix<const T> local{system.local + (2 * c + 1) * kBlock * W, -1, 1};  // (from, to)
    multiply<T>({x, system.rows, 1}, out, y_c, blocks, kBlock, system.rows, false);
    for (int64_t i = 0; i < kBlock; i += 2)
      multiply<T>(u, local.from(0, i), y_c.from(0, i), blocks, 2, i + 2, true);
  }
}

// power += sum over the blocks of grad_x conj(x), both (blocks, rows).
template <class T>
void add_power(const BlockSystem<T>& system, int64_t blocks, const T* x, const T* grad_x, T* power) {
  using Vec = Vectorized<T>;
  constexpr int64_t W = Vec::size();
  const int64_t N = system.N, rows = system.rows;
  const bool pairs = rows != N;
  for (int64_t n = 0; n < N; ++n) {
    Vec re = Vec::loadu(power + n * W), im(0);
    if (pairs) im = Vec::loadu(power + (N + n) * W);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t i = (k * rows + n) * W, j = i + N * W;
      const Vec x_re = Vec::loadu(x + i), g_re = Vec::loadu(grad_x + i);
      re = fmadd(g_re, x_re, re);
      if (pairs) {
        const Vec x_im = Vec::loadu(x + j), g_im = Vec::loadu(grad_x + j);
        re = fmadd(g_im, x_im, re);
        im = fmadd(g_im, x_re, fmadd(g_re.neg(), x_im, im));
      }
    }
    re.store(power + n * W);
    if (pairs) im.store(power + (N + n) * W);
  }
}

template <class T>
void backward(const BlockSystem<T>& system, int64_t blocks, const T* u_, const T* g, double* state,
              double* grad_state, T* grad_u_, const BlockGradients<T>& sums, T* scratch) {
  constexpr int64_t W = Vectorized<T>::size();
  const int64_t rows = system.rows, C = system.C;
  T *const x = scratch, *const grad_x = x + kTileBlocks * rows * W;  // before, and after each block
  const Matrix<const T> u{u_, kBlock, 1};
  const Matrix<T> grad_u{grad_u_, kBlock, 1};
  states(system, blocks, u, state, x);
  if (C == 0) multiply<T>({}, {}, {grad_x, rows, 1}, blocks, rows, 0, false);
  for (int64_t c = 0; c < C; ++c) {
    const Matrix<const T> g_c{g + c * kTile * W, kBlock, 1};
    const Matrix<const T> out{system.out + c * rows * kBlock * W, 1, kBlock};
    multiply<T>(g_c, out, {grad_x, rows, 1}, blocks, rows, kBlock, c > 0);
  }
  carry(system, blocks, true, grad_state, grad_x);
  multiply<T>({grad_x, rows, 1}, {system.in, kBlock, 1}, grad_u, blocks, kBlock, rows, false);
  multiply<T>({grad_x, 1, rows}, u, {sums.in, kBlock, 1}, rows, kBlock, blocks, true);
  add_power(system, blocks, x, grad_x, sums.power);
  for (int64_t c = 0; c < C; ++c) {
    const Matrix<const T> g_c{g + c * kTile * W, kBlock, 1};
    const Matrix<const T> local{system.local + (2 * c + 1) * kBlock * W, 1, -1};  // (to, from)
    const Matrix<T> pairs{sums.pairs + c * kBlock * kBlock * W, kBlock, 1};       // (from, to)
    for (int64_t i = 0; i < kBlock; i += 2)
      multiply<T>(g_c.from(0, i), local.from(i, i), grad_u.from(0, i), blocks, 2, kBlock - i, true);
    multiply<T>({x, 1, rows}, g_c, {sums.out + c * rows * kBlock * W, kBlock, 1}, rows, kBlock, blocks, true);
    for (int64_t i = 0; i < kBlock; i += 4)
      multiply<T>({u.at(0, i), 1, kBlock}, g_c.from(0, i), pairs.from(i, i), 4, kBlock - i, blocks, true);
  }
}

template <class T>
void load(Signal<const T> signal, int64_t channels, int64_t tokens, T* tile) {
  using Vec = Vectorized<T>;
  constexpr int64_t W = Vec::size();
  if (signal.channel_stride == 1) {
    if (channels == W) {
      for (int64_t t = 0; t < tokens; ++t)
        Vec::loadu(signal.data + t * signal.token_stride).store(tile + t * W);
    } else {
      for (int64_t t = 0; t < tokens; ++t)
        Vec::loadu(signal.data + t * signal.token_stride, channels).store(tile + t * W);
    }
    return;
  }
  for (int64_t i = 0; i < W; ++i) {
    const T* const source = signal.data + i * signal.channel_stride;
    for (int64_t t = 0; t < tokens; ++t)
      tile[t * W + i] = i < channels ? source[t * signal.token_stride] : T(0);
  }
}

template <class T>
void store(const T* tile, bool add, int64_t channels, int64_t tokens, Signal<T> signal) {
  using Vec = Vectorized<T>;
  constexpr int64_t W = Vec::size();
  if (signal.channel_stride == 1 && channels == W) {
    for (int64_t t = 0; t < tokens; ++t) {
      T* const target = signal.data + t * signal.token_stride;
      const Vec value = Vec::loadu(tile + t * W);
      (add ? value + Vec::loadu(target) : value).store(target);
    }
    return;
  }
  for (int64_t i = 0; i < channels; ++i) {
    T* const target = signal.data + i * signal.channel_stride;
    for (int64_t t = 0; t < tokens; ++t) {
      T& element = target[t * signal.token_stride];
      element = add ? element + tile[t * W + i] : tile[t * W + i];
    }
  }
}

}  // namespace

extern const DiagonalBlocks<float> diagonal_blocks_float = {Vectorized<float>::size(), load<float>,
                                                            store<float>, forward<float>, backward<float>};
extern const DiagonalBlocks<double> diagonal_blocks_double = {
    Vectorized<double>::size(), load<double>, store<double>, forward<double>, backward<double>};

}  // namespace spade_ext::CPU_CAPABILITY
