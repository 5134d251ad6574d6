// Vector arithmetic for inner loops, compiled once for each level of the CPU and chosen at run time.
#pragma once

#include <cstdint>

namespace spade_ext {

// A matrix by rows, `stride` elements apart.
template <class T>
struct MatrixView {
  T* data;
  int64_t stride;
};

template <class T>
struct RowProducts {
  // out (rows, width) += a (rows, n) b (n, width), in the order of n. Fastest for rows = kProductRows.
  void (*multiply_add)(MatrixView<const T> a, MatrixView<const T> b, MatrixView<T> out, int64_t rows,
                       int64_t n, int64_t width);
};

constexpr int64_t kProductRows = 4;

// The functions for this CPU, T = float or double. ATEN_CPU_CAPABILITY chooses another level, as for torch.
template <class T>
const RowProducts<T>& row_products();

}  // namespace spade_ext
