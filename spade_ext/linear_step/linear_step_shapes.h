#pragma once

#include <ATen/ops/empty.h>
#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>

namespace spade_ext::linear_step_shapes {

inline void check(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* op = "linear_step";
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has shape ", shape_text(x), ", expected (..., K)");
  check_dim(op, "weight", weight, 2, "(N, K)");
  check_floating(op, "x", x);
  check_like(op, "weight", weight, "x", x);
  check_size(op, "weight", weight, 1, x.sym_size(-1), "(N, K)");
  if (is_given(bias)) {
    check_dim(op, "bias", *bias, 1, "(N,)");
    check_like(op, "bias", *bias, "x", x);
    check_size(op, "bias", *bias, 0, weight.sym_size(0), "(N,)");
  }
}

// An uninitialised (..., N).
inline at::Tensor empty_result(const at::Tensor& x, const at::Tensor& weight) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

}  // namespace spade_ext::linear_step_shapes
