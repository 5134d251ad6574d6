#pragma once

#include <ATen/core/Tensor.h>
#include <spade_ext/export.h>

#include <optional>

namespace spade_ext {

// x weight^T + bias for few rows of x, at the speed at which weights come from memory, without gradients.
//
// x (..., K), weight (N, K), bias (N), float64, float32, float16 or bfloat16, summed in float32, or float64.
// Any strides; a weight whose rows are not contiguous is copied first. Returns (..., N), contiguous; a row
// does not depend on the others.
SPADE_EXT_API at::Tensor linear_step(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias = std::nullopt);

}  // namespace spade_ext
