// Products of a weight's rows with few rows, compiled once for each level of the CPU and chosen at run time.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

namespace spade_ext {

// x (rows, K) and out (rows, N), contiguous; weight (N, K), rows weight_stride apart; bias (N), or null.
template <class scalar_t>
struct LinearStepTask {
  const at::opmath_type<scalar_t>* x;
  const scalar_t *weight, *bias;
  scalar_t* out;
  int64_t rows, N, K, weight_stride;
};

template <class scalar_t>
struct LinearStepRows {
  // The columns begin to end of out. No number depends on which others are computed with it.
  void (*multiply)(const LinearStepTask<scalar_t>& task, int64_t begin, int64_t end);
};

// The function for this CPU: double, float, at::Half or at::BFloat16.
template <class scalar_t>
const LinearStepRows<scalar_t>& linear_step_rows();

}  // namespace spade_ext
