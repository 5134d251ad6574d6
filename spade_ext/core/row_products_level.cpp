// Compiled once a level, with CPU_CAPABILITY naming it. Everything stands in a namespace of that name: a
// function that two levels shared could be taken from the wrong one and stop an older CPU.
#include <ATen/cpu/vec/vec.h>
#include <spade_ext/core/row_products.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

// `count` vectors of columns: their sums stay in registers over all rows.
template <int count, class T>
void combine_columns(const T* weights, const T* rows, int64_t stride, int64_t n, T* out) {
  constexpr int64_t size = Vectorized<T>::size();
  Vectorized<T> sums[count];
  for (int c = 0; c < count; ++c) sums[c] = Vectorized<T>::loadu(out + c * size);
  for (int64_t r = 0; r < n; ++r, rows += stride) {
    const Vectorized<T> weight(weights[r]);
    for (int c = 0; c < count; ++c)
      sums[c] = at::vec::fmadd(weight, Vectorized<T>::loadu(rows + c * size), sums[c]);
  }
  for (int c = 0; c < count; ++c) sums[c].store(out + c * size);
}

template <class T>
void combine(const T* weights, const T* rows, int64_t stride, int64_t n, int64_t width, T* out) {
  constexpr int64_t size = Vectorized<T>::size();
  int64_t c = 0;
  for (; c + 8 * size <= width; c += 8 * size) combine_columns<8>(weights, rows + c, stride, n, out + c);
  for (; c + 4 * size <= width; c += 4 * size) combine_columns<4>(weights, rows + c, stride, n, out + c);
  for (; c + size <= width; c += size) combine_columns<1>(weights, rows + c, stride, n, out + c);
  for (; c < width; ++c) {
    T sum = out[c];
    for (int64_t r = 0; r < n; ++r) sum += weights[r] * rows[r * stride + c];
    out[c] = sum;
  }
}

template <class T>
void exp(T* x, int64_t n) {
  constexpr int64_t size = Vectorized<T>::size();
  for (int64_t i = 0; i < n; i += size) {
    const int count = static_cast<int>(n - i < size ? n - i : size);
    Vectorized<T>::loadu(x + i, count).exp().store(x + i, count);
  }
}

}  // namespace

extern const RowProducts<float> row_products_float = {combine<float>, exp<float>};
extern const RowProducts<double> row_products_double = {combine<double>, exp<double>};

}  // namespace spade_ext::CPU_CAPABILITY
