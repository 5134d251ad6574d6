// Compiled once a level, with CPU_CAPABILITY naming it. Everything stands in a namespace of that name: a
// function that two levels shared could be taken from the wrong one and stop an older CPU.
#include <ATen/cpu/vec/vec.h>
#include <spade_ext/core/row_products.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

// `rows` rows and `count` vectors of columns of the result: their sums stay in registers over all n.
template <int rows, int count, class T>
void tile(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> out, int64_t n) {
  using Vec = Vectorized<T>;
  constexpr int64_t size = Vec::size();
  Vec sums[rows][count];
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < count; ++c) sums[r][c] = Vec::loadu(out.data + r * out.stride + c * size);
  }
  for (int64_t i = 0; i < n; ++i) {
    Vec columns[count];
    for (int c = 0; c < count; ++c) columns[c] = Vec::loadu(b.data + i * b.stride + c * size);
    for (int r = 0; r < rows; ++r) {
      const Vec weight(a.data[r * a.stride + i]);
      for (int c = 0; c < count; ++c) sums[r][c] = at::vec::fmadd(weight, columns[c], sums[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < count; ++c) sums[r][c].store(out.data + r * out.stride + c * size);
  }
}

template <int rows, class T>
void strip(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> out, int64_t n, int64_t width) {
  constexpr int64_t size = Vectorized<T>::size();
  auto from = [](auto view, int64_t column) {
    view.data += column;
    return view;
  };
  int64_t c = 0;
  for (; c + 3 * size <= width; c += 3 * size) tile<rows, 3>(a, from(b, c), from(out, c), n);
  if (c + 2 * size <= width) tile<rows, 2>(a, from(b, c), from(out, c), n), c += 2 * size;
  if (c + size <= width) tile<rows, 1>(a, from(b, c), from(out, c), n), c += size;
  for (; c < width; ++c) {
    for (int r = 0; r < rows; ++r) {
      T sum = out.data[r * out.stride + c];
      for (int64_t i = 0; i < n; ++i) sum += a.data[r * a.stride + i] * b.data[i * b.stride + c];
      out.data[r * out.stride + c] = sum;
    }
  }
}

template <class T>
void multiply_add(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> out, int64_t rows, int64_t n,
                  int64_t width) {
  for (; rows > 0; rows -= kProductRows) {
    if (rows >= 4)
      strip<4>(a, b, out, n, width);
    else if (rows == 3)
      strip<3>(a, b, out, n, width);
    else if (rows == 2)
      strip<2>(a, b, out, n, width);
    else
      strip<1>(a, b, out, n, width);
    a.data += kProductRows * a.stride;
    out.data += kProductRows * out.stride;
  }
}

}  // namespace

extern const RowProducts<float> row_products_float = {multiply_add<float>};
extern const RowProducts<double> row_products_double = {multiply_add<double>};

}  // namespace spade_ext::CPU_CAPABILITY
