// Compiled once a level, with CPU_CAPABILITY naming it (core/row_products_level.cpp).
#include <spade_ext/core/vectors.h>
#include <spade_ext/linear_step/linear_step_rows.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

constexpr int kRows = 4;  // of x at a time

template <class T>
T total(const Vectorized<T>& sum) {
  T lanes[kLanes<T>], total = 0;
  sum.store(lanes);
  for (T lane : lanes) total += lane;
  return total;
}

// Row n of the weight, a single stream from memory, with `rows` rows of x from `row` on.
template <int rows, class scalar_t, class T = at::opmath_type<scalar_t>>
void multiply_row(const LinearStepTask<scalar_t>& task, int64_t n, int64_t row) {
  using Vec = Vectorized<T>;
  const scalar_t* weight = task.weight + n * task.weight_stride;
  const T* x = task.x + row * task.K;
  Vec first[rows], second[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) first[r] = second[r] = Vec(T(0));
  int64_t k = 0;
  for (; k + kPanel<T> <= task.K; k += kPanel<T>) {
    const Pair<T> w = load_pair(weight + k);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const T* values = x + r * task.K + k;
      first[r] = at::vec::fmadd(w.first, Vec::loadu(values), first[r]);
      second[r] = at::vec::fmadd(w.second, Vec::loadu(values + kLanes<T>), second[r]);
    }
  }
  if (k < task.K) {
    const Pair<T> w = load_pair(weight + k, task.K - k);
    for (int r = 0; r < rows; ++r) {
      const Pair<T> values = load_pair(x + r * task.K + k, task.K - k);
      first[r] = at::vec::fmadd(w.first, values.first, first[r]);
      second[r] = at::vec::fmadd(w.second, values.second, second[r]);
    }
  }
  const T bias = task.bias ? static_cast<T>(task.bias[n]) : T(0);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
    task.out[(row + r) * task.N + n] = static_cast<scalar_t>(total(first[r] + second[r]) + bias);
}

template <class scalar_t>
void multiply(const LinearStepTask<scalar_t>& task, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t row = 0;
    for (; row + kRows <= task.rows; row += kRows) multiply_row<kRows>(task, n, row);
    if (task.rows - row == 3) multiply_row<3>(task, n, row);
    if (task.rows - row == 2) multiply_row<2>(task, n, row);
    if (task.rows - row == 1) multiply_row<1>(task, n, row);
  }
}

}  // namespace

extern const LinearStepRows<double> linear_step_rows_double = {multiply<double>};
extern const LinearStepRows<float> linear_step_rows_float = {multiply<float>};
extern const LinearStepRows<at::Half> linear_step_rows_half = {multiply<at::Half>};
extern const LinearStepRows<at::BFloat16> linear_step_rows_bfloat16 = {multiply<at::BFloat16>};

}  // namespace spade_ext::CPU_CAPABILITY
