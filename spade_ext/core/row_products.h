// Vector arithmetic for inner loops, compiled once for each level of the CPU and chosen at run time.
#pragma once

#include <cstdint>

namespace spade_ext {

template <class T>
struct RowProducts {
  // out[0..width) += sum_r weights[r] rows[r * stride + 0..width), r in [0, n)
  void (*combine)(const T* weights, const T* rows, int64_t stride, int64_t n, int64_t width, T* out);
  // x[0..n) <- exp(x)
  void (*exp)(T* x, int64_t n);
};

// The functions for this CPU, T = float or double. ATEN_CPU_CAPABILITY chooses another level, as for torch.
template <class T>
const RowProducts<T>& row_products();

}  // namespace spade_ext
